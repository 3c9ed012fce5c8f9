"""What the Triton kernels cost, as far as that is known without a GPU. Measures no time.

1. Registers, shared memory, spills and code size of every specialisation on every target, from
   compiling it ahead of time.
2. Launches, waits for the device and bytes moved in one decode step of a Llama-3.1-8B with an EAGLE-3
   drafter, before (plain torch: the reference operations and the host's own decisions) and after
   (fused kernels). Before is traced operation by operation on real tensors; an operation counts as
   one launch, though some start several on a GPU, and a host list made a tensor as one copy. After
   counts the kernels' launches, without running them, and what torch still does around them. Matrix
   products are the same on both sides and are counted apart.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import tyro

from benchmarks.common import CONSOLE, Place, main
from benchmarks.kernels.launches import Shape, step_entries, totals
from echo_kernels import aot
from echo_rl.utils.result_store import write_json


@dataclass(frozen=True)
class Args:
    """Count what the kernels cost."""

    quick: bool = False
    """One specialisation in ten, and a small model."""
    shape: tyro.conf.OmitArgPrefixes[Shape] = field(default_factory=Shape)

    def sized(self) -> Shape:
        small = Shape(vocab=512, draft_vocab=256, hidden=256, inner=512, context=128)
        return small if self.quick else self.shape


def kernel_usage(quick: bool) -> dict[str, dict[str, Any]]:
    usage: dict[str, dict[str, Any]] = {}
    for name, target, used in aot.compile_all(aot.specs()[:: 10 if quick else 1]):
        usage.setdefault(name, {})[target] = asdict(used)
    return usage


def script() -> None:
    args = tyro.cli(Args)
    place = Place("kernels", args.quick)
    shape = args.sized()
    entries = step_entries(shape)
    result = {
        "compiled_by": aot.tool_versions(),
        "kernels": kernel_usage(args.quick),
        "shape": asdict(shape),
        "step": entries,
        "totals": totals(entries, shape),
    }
    write_json(place.result, result)
    for entry in entries:
        CONSOLE.print(f"{entry['calls']:3d} x {entry['name']}: {entry['before']} -> {entry['after']}", highlight=False)
    CONSOLE.print(str(result["totals"]), highlight=False)


if __name__ == "__main__":
    main(script)
