"""Owns every tensor of the runtime: target, drafter, cache. Runs a step's passes; decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from echo_rl.contracts import Forest, Frontier, Selection, SpecPlan
from echo_rl.errors import ConfigError
from echo_rl.runtime.drafters.eagle3 import Drafter
from echo_rl.runtime.drafters.growing import grow
from echo_rl.runtime.kv_cache import KVCache
from echo_rl.runtime.layout import Layout
from echo_rl.runtime.models.target import Target
from echo_rl.runtime.scheduler import Batch
from echo_rl.runtime.sequence import Sequence
from echo_rl.runtime.verification import RowLogits, SuperTree, flatten

ABSORB_REQUESTS = 16
"""Requests far behind whose committed tokens the drafter reads in one pass."""
FAR_BEHIND = 16
"""Most pairs of a request that the drafter reads beside those whose output it needs; more (a prompt) go first."""


@dataclass(frozen=True)
class Verified:
    """The super-tree of a step and its logits."""

    tree: SuperTree
    logits: RowLogits


class Runner:
    """Methods follow a step: `layout`, `draft`, `verify`, `keep`."""

    def __init__(self, target: Target, drafter: Drafter | None, slots: int, block_size: int) -> None:
        self.target = target
        self.drafter = drafter
        self.device = target.embed.device
        self._block_size = block_size
        arch = target.arch
        shapes = None
        if drafter is not None:
            c = drafter.config
            shapes = (c.kv_heads, c.head_dim, len(c.taps) * c.target_hidden)
        pool = (arch.layers, arch.kv_heads, arch.head_dim)
        self.spare = slots
        """A cache row that no block owns: where padding goes."""
        self.cache = KVCache.allocate(slots + 1, pool, shapes, self.device, target.embed.dtype)

    def layout(self, sequences: Seq[Sequence]) -> Layout:
        return Layout(sequences, self._block_size, self.device)

    @torch.inference_mode()
    def draft(
        self,
        sequences: Seq[Sequence],
        layout: Layout,
        plan: SpecPlan,
        extend: Callable[[Frontier, SpecPlan], torch.Tensor],
    ) -> Forest:
        """Let the drafter catch up with the committed tokens, then grow the forest. Raises `ConfigError`."""
        if self.drafter is None:
            raise ConfigError(
                "the controller wants to speculate but no drafter is loaded; give a drafter or use 'none'"
            )
        roots = self._catch_up(self.drafter, sequences, layout)
        return grow(self.drafter, self.cache, layout, roots, plan, extend)

    def _catch_up(self, drafter: Drafter, sequences: Seq[Sequence], layout: Layout) -> torch.Tensor:
        """Show the drafter the pairs (feature i, token i + 1) it hasn't seen; [B, hidden] at each last pair."""
        far = [i for i, s in enumerate(sequences) if s.kv_len - s.draft_len > FAR_BEHIND]
        for begin in range(0, len(far), ABSORB_REQUESTS):
            self._absorb(drafter, sequences, layout, far[begin : begin + ABSORB_REQUESTS])
        last = layout.host_kv_lens[: len(sequences)] - 1
        pairs = _unseen(
            sequences, [(i, min(s.draft_len, s.kv_len - 1), s.kv_len) for i, s in enumerate(sequences)], layout
        )
        starts = np.arange(len(sequences) + 1, dtype=np.int32)  # one row a request
        seen = torch.ones(len(sequences), 1, dtype=torch.bool, device=self.device)
        view = layout.host_view(pairs.slots, starts, last, 1, seen)
        for sequence in sequences:
            sequence.draft_len = sequence.kv_len
        features = drafter.project(self.cache.features.index_select(0, view.slots))
        wanted = layout.tensor(pairs.ends - 1) if len(pairs.slots) > len(sequences) else None
        tokens, positions = layout.tensor(pairs.tokens), layout.tensor(pairs.positions)
        return drafter.forward(tokens, features, positions, self.cache, view, wanted)

    def _absorb(self, drafter: Drafter, sequences: Seq[Sequence], layout: Layout, group: Seq[int]) -> None:
        """All unseen pairs of these requests but the last of each."""
        pairs = _unseen(sequences, [(i, sequences[i].draft_len, sequences[i].kv_len - 1) for i in group], layout)
        for i in group:
            sequences[i].draft_len = sequences[i].kv_len - 1
        slots = layout.tensor(pairs.slots)
        features = drafter.project(self.cache.features[slots])
        drafter.absorb(layout.tensor(pairs.tokens), features, layout.tensor(pairs.positions), self.cache, slots)

    @torch.inference_mode()
    def verify(self, batch: Batch, selection: Selection, layout: Layout) -> Verified:
        """One target pass over the flattened super-tree and the prompt chunks."""
        tree = flatten(batch, selection, layout)
        taps = self.drafter.taps if self.drafter else ()
        hidden, features = self.target.forward(tree.tokens, tree.positions, self.cache, tree.view, taps)
        if features is not None:
            self.cache.features[tree.view.slots] = features
        return Verified(tree, self._logits(tree, hidden))

    def _logits(self, tree: SuperTree, hidden: torch.Tensor) -> RowLogits:
        """Logits of every row that `accept` could ask for, computed in one product."""
        first_chunk = max(tree.children.values(), default=-1) + 1
        rows = sorted({*range(first_chunk), *tree.roots})
        logits = self.target.logits(hidden if len(rows) == len(hidden) else hidden[rows])
        return RowLogits(logits, {row: i for i, row in enumerate(rows)})

    def keep(self, layout: Layout, accepted: Seq[tuple[int, ...]]) -> None:
        """Move the accepted nodes' keys, values and features behind their roots.

        `accepted` [B] are node indices in row order, so node i lies at logical position kv_len + 1 + i.
        """
        moves = [(r, node, j) for r, path in enumerate(accepted) for j, node in enumerate(path) if node != j]
        if not moves:
            return
        base = (layout.host_kv_lens + 1).tolist()
        source = [layout.host_slot(r, base[r] + node) for r, node, _ in moves]
        target = [layout.host_slot(r, base[r] + j) for r, _, j in moves]
        with torch.inference_mode():
            slots = torch.tensor([source, target], device=self.device)
            self.cache.compact(slots[0], slots[1])


@dataclass(frozen=True)
class _Pairs:
    """Committed pairs (feature of token i, token i + 1) of R requests, one request after the other. n rows."""

    tokens: np.ndarray  # [n] token i + 1
    positions: np.ndarray  # [n] i
    slots: np.ndarray  # [n] of token i
    ends: np.ndarray  # [R] the row after a request's last


def _unseen(sequences: Seq[Sequence], spans: Seq[tuple[int, int, int]], layout: Layout) -> _Pairs:
    """The pairs i in [begin, end) of each (request, begin, end)."""
    tokens = np.array([t for i, begin, end in spans for t in sequences[i].tokens[begin + 1 : end + 1]])
    positions = np.array([place for _, begin, end in spans for place in range(begin, end)])
    owner = np.array([i for i, begin, end in spans for _ in range(begin, end)])
    ends = np.array(list(accumulate(end - begin for _, begin, end in spans)))
    return _Pairs(tokens, positions, layout.host_slots(owner, positions), ends)
