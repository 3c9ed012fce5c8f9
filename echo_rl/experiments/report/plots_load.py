"""Draws a load test, a PNG a workload: how latencies are distributed, and the throughput over a block."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from echo_rl.experiments.plan import Run
from echo_rl.experiments.report.load import LATENCIES
from echo_rl.experiments.report.measures import blocks_of
from echo_rl.experiments.targets.http.config import LoadConfig
from echo_rl.experiments.targets.http.record import LoadRecord, together
from echo_rl.utils.plotting import COLOURS, STYLE
from echo_rl.workloads.metrics import inter_token_latencies
from echo_rl.workloads.records import RunRecord

NAMES = {"ttft": "time to first token", "tpot": "time per output token", "e2e": "whole request"}
BINS = 30
"""Stretches of a block over which its throughput is shown."""


def draw(config: LoadConfig, done: Mapping[Run, LoadRecord], out: Path) -> list[Path]:
    """Writes a PNG for each workload into `out`; returns their paths."""
    paths = []
    for workload in config.workloads:
        arms = {arm: blocks_of(done, workload, arm) for arm in config.servers}
        paths.append(out / f"{re.sub('[^a-z0-9.]+', '_', workload.lower())}.png")
        figure(workload, arms).savefig(paths[-1], bbox_inches="tight")
    return paths


@rc_context(STYLE)
def figure(workload: str, arms: Mapping[str, Sequence[LoadRecord]]) -> Figure:
    """Latencies as cumulative shares of requests (of tokens for the gaps between them), then tokens/s over time."""
    drawn = Figure(figsize=(15, 7), layout="constrained")
    panels = drawn.subplots(2, 3).flatten()
    for index, (arm, blocks) in enumerate(arms.items()):
        served, colour = together(blocks).served, COLOURS[index % len(COLOURS)]
        whole = [request for request in served.requests if not request.cut]
        for axes, latency in zip(panels, LATENCIES.values(), strict=False):
            _distribution(axes, [value for r in whole if (value := latency(r)) is not None], colour, arm)
        _distribution(panels[3], [gap for r in whole for gap in inter_token_latencies(r)], colour, arm)
        _over_time(panels[4], [block.served for block in blocks], colour, arm)
    for axes, name in zip(panels, (*NAMES.values(), "gap between tokens"), strict=False):
        axes.set(xlabel=f"{name}, seconds", ylabel="share", ylim=(0, 1))
    panels[3].set_xscale("log")  # the gap of a step is short, one behind a prompt's prefill long
    for axes in panels[:3]:
        axes.set_xlim(left=0)
    panels[4].set(xlabel="seconds since the block began", ylabel="output tokens / s", ylim=(0, None))
    handles, labels = panels[4].get_legend_handles_labels()
    panels[5].legend(handles, labels, loc="center left").set_title(workload)
    panels[5].set_axis_off()
    return drawn


def _distribution(axes: Axes, values: Sequence[float], colour: str, arm: str) -> None:
    if values:
        axes.ecdf(values, color=colour, label=arm, linewidth=1.8)


def _over_time(axes: Axes, blocks: Sequence[RunRecord], colour: str, arm: str) -> None:
    """The mean over blocks; a block that was over earlier counts as idle from there."""
    edges = np.linspace(0.0, max(block.seconds for block in blocks), BINS + 1)
    times = [time for block in blocks for request in block.requests for time in request.token_times]
    counts, _ = np.histogram(times, edges)
    speeds = counts / (edges[1] - edges[0]) / len(blocks)
    axes.plot((edges[1:] + edges[:-1]) / 2, speeds, color=colour, label=arm, linewidth=1.8)
