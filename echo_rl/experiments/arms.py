"""The arms of an experiment as controllers, and what they are made of."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Sequence

from echo_rl.contracts import Controller, MakeController
from echo_rl.controllers.arm import Arm
from echo_rl.experiments.plan import Run
from echo_rl.utils.result_store import digest_of


def make_arm(make: MakeController, label: str) -> Controller:
    """A new controller of that arm. Raises `UnknownController` and `ConfigError`."""
    arm = Arm.parse(label)
    return make(arm.controller, **arm.options)


def made_of(controller: Controller) -> dict[str, str]:
    """The digest of a controller's materials, where it has any: what was measured with others is not its own."""
    materials = getattr(controller, "materials", ())
    return {"made of": digest_of(pickle.dumps(materials))} if materials else {}


class Arms:
    """One controller an arm and workload, which goes on with what it has learnt from block to block.

    Not over an interruption: then it is a new one, warmed up as at first. Raises `UnknownController` and `ConfigError`
    for an arm that can't be made.
    """

    def __init__(
        self,
        labels: Sequence[str],
        workloads: Iterable[str],
        make: MakeController,
        warm_up: Callable[[Controller, str], Controller],
    ) -> None:
        """``warm_up(controller, workload)`` readies a new one for its first run."""
        self._cold = {(label, workload): make_arm(make, label) for workload in workloads for label in labels}
        self._warm: dict[tuple[str, str], Controller] = {}
        self._warm_up = warm_up
        self.made_of = {
            f"{label} {name}": digest
            for (label, _), controller in self._cold.items()
            for name, digest in made_of(controller).items()
        }

    def ready(self, run: Run) -> Controller:
        """The controller of that arm and workload, warmed up."""
        key = (run.arm, run.workload)
        if key in self._cold:
            self._warm[key] = self._warm_up(self._cold.pop(key), run.workload)
        return self._warm[key]
