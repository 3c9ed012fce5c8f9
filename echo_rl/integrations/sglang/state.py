"""Holds what the hooks of one SGLang process share: the configuration, the load observer and the steering.

Made by `plugin` and handed to every hook, so that nothing lives in a module. Knows SGLang only by the
objects that it is given.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from echo_rl import __version__
from echo_rl.errors import ConfigError
from echo_rl.integrations.sglang.load_observer import LoadObserver
from echo_rl.integrations.sglang.metrics import Exporter
from echo_rl.integrations.sglang.ranks import RankGroup, Ranks, SingleRank
from echo_rl.integrations.sglang.settings import PluginConfig
from echo_rl.integrations.sglang.steering import Decision, Steering

log = logging.getLogger(__name__)


class PluginState:
    """The state of one process's hooks. `bind` is called once SGLang has its worker; unbound it refuses to serve."""

    def __init__(self, config: PluginConfig, registry: Any = None) -> None:
        """`registry` is where the Prometheus counters are kept; None means the process's own."""
        self.config = config
        self._registry = registry
        self.load_observer = LoadObserver()
        self.ranks: Ranks = SingleRank()
        self.steering: Steering | None = None
        self.bound = False
        self._exporter: Exporter | None = None

    def bind(self, parallel: Any, top_k: int) -> None:
        """Begins to decide for a worker. `parallel` is SGLang's parallel context.

        Raises `ConfigError` where the topology isn't supported or the ranks' configurations differ.
        """
        if self.bound:
            raise ConfigError("SGLang made two speculative workers in one process; that is not supported")
        require_topology(parallel)
        if parallel.tp_size > 1:
            self.ranks = RankGroup(parallel.tp_group.cpu_group, max(shape.steps for shape in self.config.choices))
        self.ranks.require_same(json.dumps([__version__, asdict(self.config)], sort_keys=True, default=str))
        if self.ranks.leads:
            self.steering = Steering(self.config.make(), self.config.choices, top_k, self.config.costs())
            self._exporter = Exporter(self.steering, self.config.controller, self._registry)
        self.bound = True
        log.info("echo-rl decides speculation: mode %s, controller %s", self.config.mode, self.config.controller)

    def decide(self, batch: int) -> Decision:
        """Decides the next decode step's shape, the same on every rank."""
        return self.ranks.agree(self._launch(batch))

    def complete(self, accepts: Sequence[int], batch: int) -> None:
        """Reports a step: `accepts` holds how many drafted tokens were accepted, one number a request."""
        if self.steering is not None and self._exporter is not None:
            self.steering.complete(accepts, batch)
            self._exporter.export()

    def before_batch(self, scheduler: Any, batch: Any, *_: Any, **__: Any) -> None:
        """Is the BEFORE hook of ``Scheduler.run_batch``. Raises `ConfigError` where no worker was bound."""
        if not self.bound:
            raise ConfigError(
                f"SGLang is about to serve without echo-rl, though ECHO_RL_CONFIG asks for it; {self.remedy()}"
            )
        if not self.load_observer.observe(scheduler, batch) and self.steering is not None:
            self.steering.interrupt()

    def remedy(self) -> str:
        """Names the options that SGLang must be started with."""
        launch = self.config.launch
        common = f"start it with --speculative-algorithm EAGLE3 --speculative-num-steps {launch.steps}"
        if self.config.mode == "adaptive":
            return f"{common} --speculative-eagle-topk 1 --speculative-adaptive"
        return (
            f"{common} --speculative-num-draft-tokens {launch.width}, --speculative-eagle-topk above 1 and "
            "without --speculative-adaptive"
        )

    def _launch(self, batch: int) -> Callable[[], Decision]:
        def launch() -> Decision:
            assert self.steering is not None, "only the leader decides"
            return self.steering.launch(self.load_observer.load(batch))

        return launch


def require_topology(parallel: Any) -> None:
    """Raises `ConfigError` unless all ranks see every request: tensor parallelism alone."""
    for name, option in (("pp_size", "--pipeline-parallel-size"), ("attn_dp_size", "--enable-dp-attention")):
        if getattr(parallel, name) > 1:
            raise ConfigError(f"echo-rl decides for whole batches, which {option} splits up; leave it out")
