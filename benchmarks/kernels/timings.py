"""Times every kernel of a decode step against its torch reference, on the same device and the same tensors.

The operations and shapes are those that `cost` counts launches of. One that fails is
reported and the others are timed.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.kernels.launches import Case, Shape, decision_cases, model_cases
from echo_rl.utils.result_store import write_json

Timer = Callable[[Callable[[], Any]], tuple[float, float, float]]
"""call -> (median, lower, upper quartile) seconds."""


@dataclass(frozen=True)
class Args:
    """Time the kernels of a decode step."""

    out: Path
    """The result's file."""
    device: str = "cuda"
    shape: tyro.conf.OmitArgPrefixes[Shape] = field(default_factory=Shape)


def on_gpu(call: Callable[[], Any]) -> tuple[float, float, float]:
    """Seconds of device time of one call; the caches are flushed before each."""
    from triton.testing import do_bench

    median, low, high = do_bench(call, quantiles=(0.5, 0.25, 0.75))
    return median / 1e3, low / 1e3, high / 1e3


def cases(shape: Shape) -> Iterator[Case]:
    """The step's operations, their tensors on the default device."""
    yield from model_cases(shape)
    yield from decision_cases(shape)


def measured(found: Iterable[Case], timer: Timer) -> Iterator[dict[str, Any]]:
    """A row an operation; where it fails, the row says so. An iterator that fails ends with such a row."""
    source, failure = iter(found), "the next operation's tensors"
    while True:
        try:
            case = next(source)
        except StopIteration:
            return
        except Exception as error:
            yield failed(failure, error)
            return
        try:
            yield row_of(case, timer)
        except Exception as error:  # of a kernel that doesn't run on this device: that is what is looked for
            yield failed(case.name, error)


def row_of(case: Case, timer: Timer) -> dict[str, Any]:
    kernel, reference = timed(case.after, timer), timed(case.before, timer)
    speedup = reference["median"] / kernel["median"]
    row = {"name": case.name, "calls": case.calls, "kernel": kernel, "reference": reference, "speedup": speedup}
    return row | ({"bytes_a_second": case.least / kernel["median"]} if case.least else {})


def failed(name: str, error: Exception) -> dict[str, Any]:
    traceback.print_exception(error)
    return {"name": name, "error": f"{type(error).__name__}: {error}"}


def timed(call: Callable[[], Any], timer: Timer) -> dict[str, float]:
    return dict(zip(("median", "low", "high"), timer(call), strict=True))


def script() -> int:
    args = tyro.cli(Args, description=__doc__)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with torch.device(args.device):
        for row in measured(cases(args.shape), on_gpu):
            rows.append(row)
            write_json(args.out, {"shape": asdict(args.shape), "device": torch.cuda.get_device_name(), "kernels": rows})
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(script())
