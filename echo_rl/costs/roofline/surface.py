"""Puts a roofline on a grid as a `CostProfile`, labelled as modelled in every place that names the machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from echo_rl.costs.interpolation import Axis
from echo_rl.costs.profile import CostProfile
from echo_rl.costs.roofline.hardware import HARDWARE, Assumptions
from echo_rl.costs.roofline.models import MODELS
from echo_rl.costs.roofline.timing import Dtype, Roofline
from echo_rl.errors import ConfigError

LARGEST_TREE = 61
"""Rows a request of the largest tree (60 nodes and a root) that the grid reaches at every batch size."""


@dataclass(frozen=True)
class ModelledGrid:
    """The points that are worked out. Between them the profile is linear."""

    batches: Axis = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    contexts: Axis = (128, 512, 2048, 8192, 32_768)
    widths: Axis = (1, 2, 3, 4, 6, 8, 10)
    depths: Axis = (1, 2, 3, 5, 8)
    draft_context: int = 512

    @property
    def rows(self) -> Axis:
        """Eight knots an octave up to the largest tree at the largest batch, and every batch size itself."""
        most = LARGEST_TREE * max(self.batches)
        steps = {(8 + eighth) * 2**octave // 8 for octave in range(most.bit_length()) for eighth in range(8)}
        return tuple(sorted({*(r for r in steps if 1 <= r < most), *self.batches, most}))


def roofline(
    hardware: str, model: str, tp: int = 1, dtype: Dtype = "bfloat16", assumed: Assumptions | None = None
) -> Roofline:
    """The roofline of a machine and model by name. Raises `ConfigError`."""
    if hardware not in HARDWARE:
        raise ConfigError(f"there is no hardware '{hardware}'; known: {', '.join(HARDWARE)}")
    if model not in MODELS:
        raise ConfigError(f"there is no modelled size of '{model}'; known: {', '.join(MODELS)}")
    return Roofline(HARDWARE[hardware], MODELS[model], tp, dtype, assumed or Assumptions())


def modelled_profile(source: Roofline, grid: ModelledGrid | None = None) -> CostProfile:
    """The profile of a roofline. It has no noise, since nothing was measured."""
    grid = grid or ModelledGrid()
    rows, assumed = grid.rows, source.assumed
    return CostProfile(
        device=f"modelled {source.hardware.title} x{source.tp}",
        dtype=source.dtype,
        model=source.model.name,
        threads=0,
        batches=grid.batches,
        rows=rows,
        contexts=grid.contexts,
        verify=tuple(
            tuple(tuple(source.verify(b, max(b, r), c).total for c in grid.contexts) for r in rows)
            for b in grid.batches
        ),
        draft_batches=grid.batches,
        widths=grid.widths,
        depths=grid.depths,
        draft=tuple(
            tuple(tuple(source.draft(b, w, d, grid.draft_context) for d in grid.depths) for w in grid.widths)
            for b in grid.batches
        ),
        step_overhead=assumed.step,
        spec_overhead=assumed.speculative,
        request_overhead=assumed.request,
        catch_up=source.catch_up(),
        gate_overhead=assumed.gate,
        prefill_weight=source.prompt_share(),
        provenance=_provenance(source),
        modelled=True,
    )


def _provenance(source: Roofline) -> str:
    hardware, assumed = source.hardware, asdict(source.assumed)
    assumed["compute"] = hardware.compute_share if source.assumed.compute is None else source.assumed.compute
    said = ", ".join(f"{name} {value:g}" for name, value in assumed.items())
    return (
        f"modelled, nothing measured: roofline of {source.model.name} {source.dtype} on {source.tp} {hardware.title}; "
        f"assumed {said}"
    )
