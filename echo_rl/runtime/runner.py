"""Owns every tensor of the runtime: target, drafter, cache. Runs a step's passes; decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from echo_rl.contracts import Forest, Frontier, Selection, SpecPlan
from echo_rl.errors import ConfigError
from echo_rl.runtime.drafter import Drafter
from echo_rl.runtime.forest import grow
from echo_rl.runtime.kv_cache import KVCache
from echo_rl.runtime.layout import Layout, spread
from echo_rl.runtime.scheduler import Batch
from echo_rl.runtime.sequence import Sequence
from echo_rl.runtime.target import Target
from echo_rl.runtime.verify import RowLogits, SuperTree, flatten

ABSORB_REQUESTS = 16
"""Requests whose committed tokens the drafter reads in one pass."""


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
        for begin in range(0, len(sequences), ABSORB_REQUESTS):
            group = range(begin, min(begin + ABSORB_REQUESTS, len(sequences)))
            self._absorb(drafter, sequences, layout, group)
        kv_lens = layout.kv_lens[: len(sequences)]
        owner, last = torch.arange(len(sequences), device=self.device), kv_lens - 1
        slots, one = layout.slots(owner, last), torch.ones_like(kv_lens)
        tokens = torch.tensor([s.tokens[s.kv_len] for s in sequences], device=self.device)
        seen = torch.ones(len(sequences), 1, dtype=torch.bool, device=self.device)
        view = layout.view(slots, one, last, one, seen, owner)
        for sequence in sequences:
            sequence.draft_len = sequence.kv_len
        return drafter.forward(tokens, drafter.project(self.cache.features[slots]), last, self.cache, view)

    def _absorb(self, drafter: Drafter, sequences: Seq[Sequence], layout: Layout, group: range) -> None:
        """All unseen pairs of these requests but the last of each."""
        spans = [(i, sequences[i].draft_len, sequences[i].kv_len - 1) for i in group]
        spans = [(i, begin, end) for i, begin, end in spans if begin < end]
        if not spans:
            return
        tokens = [t for i, begin, end in spans for t in sequences[i].tokens[begin + 1 : end + 1]]
        requests, begins, counts = (
            torch.tensor(column, device=self.device)
            for column in zip(*((i, begin, end - begin) for i, begin, end in spans), strict=True)
        )
        owner, local = spread(counts)
        position = begins[owner] + local
        slots = layout.slots(requests[owner], position)
        features = drafter.project(self.cache.features[slots])
        drafter.absorb(torch.tensor(tokens, device=self.device), features, position, self.cache, slots)

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

    @torch.inference_mode()
    def keep(self, layout: Layout, accepted: Seq[tuple[int, ...]]) -> None:
        """Move the accepted nodes' keys, values and features behind their roots.

        `accepted` [B] are node indices in row order, so node i lies at logical position kv_len + 1 + i.
        """
        moves = [(r, 1 + node, 1 + j) for r, path in enumerate(accepted) for j, node in enumerate(path) if node != j]
        if moves:
            owner, source, target = (torch.tensor(c, device=self.device) for c in zip(*moves, strict=True))
            base = layout.kv_lens[owner]
            self.cache.compact(layout.slots(owner, base + source), layout.slots(owner, base + target))
