"""Whether more than a node's own score tells if it is accepted: a network that sees what is around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from echo_rl.replay.levels import Restricted
from echo_rl.replay.trace import Trace

WIDTH = 4
LEAST = -7.0
"""Log-probability below which nodes are left out: they are never verified."""
FORGET = 0.9
"""What a position's past keeps, a token."""
NODES = (1, 2, 3, 5, 7, 15)
BATCH = 4096
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Nodes:
    """The nodes of a trace: what is known of each ([P, M, K]), its log-probability, and whether it was accepted."""

    known: Floats
    scores: Floats  # [P, M]
    accepted: NDArray[np.bool_]  # [P, M]
    parents: NDArray[np.int64]  # [P, M]

    @property
    def counted(self) -> NDArray[np.bool_]:
        return self.scores > LEAST


def ranked(train: Trace, test: Trace, steps: int) -> dict[str, Any]:
    """Accepted tokens a request and step of the likeliest nodes of the batch: by score, as learned, at best."""
    shown, new = nodes_of(train), nodes_of(test)
    network = fit(shown, steps)
    with torch.no_grad():
        learned = network(torch.from_numpy(new.known)).squeeze(2).numpy()
    learned = np.where(new.counted, learned, -np.inf)
    for node in range(learned.shape[1]):  # no likelier than its parent, so that trees stay whole
        parent = new.parents[:, node]
        above = np.where(parent < 0, np.inf, learned[np.arange(len(learned)), parent])
        learned[:, node] = np.minimum(learned[:, node], above)
    orders = {"score": _odds(new.scores), "learned": learned}
    return {
        "width": WIDTH,
        "nodes": list(NODES),
        "accepted": {name: [_accepted(new, order, count) for count in NODES] for name, order in orders.items()},
        "most": [min(float(count), float(new.accepted.sum(1).mean())) for count in NODES],
        "log_loss": {name: _log_loss(new, order) for name, order in orders.items()},
    }


def nodes_of(trace: Trace) -> Nodes:
    forest = trace.restricted(WIDTH)
    return Nodes(_known(trace, forest), forest.scores, accepted_nodes(forest), forest.parents)


def accepted_nodes(forest: Restricted) -> NDArray[np.bool_]:
    """[P, M] the nodes that the target would accept."""
    accepted = np.zeros(forest.scores.shape, dtype=bool)
    row, level = (forest.path >= 0).nonzero()
    accepted[row, forest.path[row, level]] = True
    return accepted


def _known(trace: Trace, forest: Restricted) -> Floats:
    """[P, M, K] the node's, its parent's and its siblings' scores, its place in the tree, the request's past."""
    positions, count = forest.scores.shape
    rows, ranks = np.arange(positions)[:, None], np.broadcast_to(np.arange(count) % WIDTH, forest.scores.shape)
    root, above = forest.parents < 0, forest.parents.clip(min=0)
    scores = forest.scores.clip(min=-12.0)
    parents = np.where(root, 0.0, scores[rows, above])
    own = scores - parents
    siblings = own.reshape(positions, -1, WIDTH)
    best, second, mass = siblings[:, :, 0], siblings[:, :, 1], np.log(np.exp(siblings).sum(2))
    of_siblings = (np.repeat(each, WIDTH, axis=1) for each in (best, second, mass))
    numbers = [scores, parents, own, np.where(root, 0.0, own[rows, above]), *of_siblings]
    places = [np.broadcast_to(forest.depths == d, root.shape) for d in range(trace.max_depth)]
    places += [ranks == k for k in range(WIDTH)] + [~root & (ranks[rows, above] == k) for k in range(WIDTH)]
    past = [np.broadcast_to(each[:, None], root.shape) for each in _past(trace, forest)]
    return np.stack([*(each / 3.0 for each in numbers), *places, *past], axis=2).astype(np.float32)


def _past(trace: Trace, forest: Restricted) -> tuple[Floats, Floats, Floats]:
    """[P] of the positions before: how much likelier the first token was than told, how often it was right; sampled."""
    right = (forest.path[:, 0] == 0).astype(np.float32)
    surprise = right - np.exp(forest.scores[:, 0])
    seen, felt, sampled = (np.zeros(len(right), dtype=np.float32) for _ in range(3))
    for response, first in zip(trace.responses, trace.first, strict=True):
        total = felt_now = seen_now = 0.0
        for place in range(first, first + response.positions):
            felt[place], seen[place] = felt_now / (total + 1.0), seen_now / (total + 1.0)
            total, felt_now, seen_now = (
                FORGET * old + new for old, new in ((total, 1.0), (felt_now, surprise[place]), (seen_now, right[place]))
            )
        sampled[first : first + response.positions] = response.params.temperature > 0
    return felt, seen, sampled


def fit(nodes: Nodes, steps: int) -> nn.Module:
    """Log-odds of acceptance."""
    torch.manual_seed(0)
    known = torch.from_numpy(nodes.known[nodes.counted])
    labels = torch.from_numpy(nodes.accepted[nodes.counted].astype(np.float32))
    network = nn.Sequential(nn.Linear(known.shape[1], 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        rows = torch.randint(len(known), (BATCH,))
        loss = functional.binary_cross_entropy_with_logits(network(known[rows]).squeeze(1), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


def _accepted(nodes: Nodes, order: Floats, count: int) -> float:
    """Accepted nodes a position among the best `count` a position, chosen over all positions together."""
    flat = order.reshape(-1)
    best = np.argpartition(-flat, count * len(order))[: count * len(order)]
    return float(nodes.accepted.reshape(-1)[best].sum() / len(order))


def _odds(scores: Floats) -> Floats:
    scores = scores.clip(max=-1e-6)
    odds: Floats = scores - np.log(-np.expm1(scores))
    return odds


def _log_loss(nodes: Nodes, odds: Floats) -> float:
    each = torch.from_numpy(odds[nodes.counted]), torch.from_numpy(nodes.accepted[nodes.counted].astype(np.float32))
    return float(functional.binary_cross_entropy_with_logits(*each))
