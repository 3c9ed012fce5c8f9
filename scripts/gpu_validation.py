#!/usr/bin/env python3
"""Everything that needs a GPU, in one unattended run with one report.

    python scripts/gpu_validation.py --dry-run    # the plan, with the exact commands; needs no GPU
    python scripts/gpu_validation.py              # hours; run it again to go on where it stopped
    python scripts/gpu_validation.py --again bench
    python scripts/gpu_validation.py --minutes 9  # where a machine is lent for minutes at a time: again and again

Every stage is made of processes of its own with a time limit, a log and a folder; none stops the others.
The committed results stay as they are: benchmarks write into the stages' folders.
The tests of the runtime alone can be run on a GPU with ``ECHO_RL_TEST_DEVICE=cuda pytest tests/runtime``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, Python looks beside it alone

from echo_rl.errors import EchoError
from scripts.gpu.plan import Args, plan
from scripts.gpu.runner import Validation


def show(args: Args) -> None:
    """Print the plan."""
    for stage in plan(args):
        skipped = f"; SKIPPED: {stage.skip}" if stage.skip else ""
        print(f"# {stage.name}: {stage.title}; at most {stage.minutes * args.patience:.0f} min{skipped}")
        print(*stage.lines(), "", sep="\n")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    try:
        if args.dry_run:
            return show(args)
        sys.exit(0 if Validation(args).run() else 1)
    except EchoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")


if __name__ == "__main__":
    main()
