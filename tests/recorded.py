"""Recordings without a model: random forests, and a target that often agrees with the likeliest nodes."""

from __future__ import annotations

import numpy as np

from echo_rl.contracts import SamplingParams
from echo_rl.replay.levels import Level
from echo_rl.replay.response import Response
from echo_rl.replay.trace import Trace

DEPTH, WIDTH = 5, 4


def random_levels(seed: int, positions: int, width: int = WIDTH, depth: int = DEPTH) -> tuple[Level, ...]:
    """Forests as a drafter of this width would grow them, and a target that often agrees."""
    g = np.random.default_rng(seed)

    def children(parents: np.ndarray) -> np.ndarray:
        shares = -np.sort(-g.dirichlet(np.full(width + 2, 0.6), parents.shape), axis=-1)[..., :width]
        return (parents[..., None] + np.log(shares + 1e-6)).astype(np.float32)

    scores = children(np.zeros((positions, 1), np.float32))
    path = np.where(g.random(positions) < 0.7, g.integers(0, 2, positions), -1)
    levels = [Level(scores, np.full((positions, 1), -1), path)]
    for _ in range(depth - 1):
        flat = levels[-1].scores.reshape(positions, -1)
        parents = np.argsort(-flat, axis=1, kind="stable")[:, :12]  # more than any beam needs
        scores = children(np.take_along_axis(flat, parents, 1))
        hit = parents == path[:, None]
        inside = hit.any(1) & (path >= 0) & (g.random(positions) < 0.75)
        path = np.where(inside, hit.argmax(1) * width + g.integers(0, 2, positions), -1)
        levels.append(Level(scores, parents, path))
    return tuple(levels)


def random_trace(seed: int = 0, responses: int = 12, length: int = 25, width: int = WIDTH, depth: int = DEPTH) -> Trace:
    g = np.random.default_rng(seed)
    made = tuple(
        Response(
            suite=("chat", "code")[i % 2],
            prompt=tuple(g.integers(3, 200, 4 + i).tolist()),
            params=SamplingParams(seed=i, max_new_tokens=length),
            tokens=tuple(g.integers(3, 200, length + depth).tolist()),
            length=length,
            finish_reason="length",
        )
        for i in range(responses)
    )
    return Trace(made, random_levels(seed, responses * (length - 1), width, depth), "random")
