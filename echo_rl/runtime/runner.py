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
from echo_rl.runtime.verify import SuperTree, flatten

CATCH_UP_ROWS = 1_024
"""Most rows of one drafter pass over committed tokens."""


@dataclass(frozen=True)
class Verified:
    """The super-tree of a step and its logits on demand."""

    tree: SuperTree
    logits_of: Callable[[Seq[int]], torch.Tensor]


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
        self.cache = KVCache.allocate(slots, pool, shapes, self.device, target.embed.dtype)

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
        """Run the drafter over pairs (feature i, token i + 1) it hasn't seen; [B, hidden] at each last pair."""
        done: list[torch.Tensor | None] = [None] * len(sequences)
        share = max(1, CATCH_UP_ROWS // len(sequences))
        while behind := [i for i, s in enumerate(sequences) if done[i] is None]:
            spans = [
                (i, sequences[i].draft_len, min(sequences[i].draft_len + share, sequences[i].kv_len)) for i in behind
            ]
            hidden = self._pairs(drafter, sequences, layout, spans)
            row = -1
            for i, begin, end in spans:
                row += end - begin
                sequences[i].draft_len = end
                if end == sequences[i].kv_len:
                    done[i] = hidden[row]
        return torch.stack([h for h in done if h is not None])

    def _pairs(
        self, drafter: Drafter, sequences: Seq[Sequence], layout: Layout, spans: list[tuple[int, int, int]]
    ) -> torch.Tensor:
        """One causal drafter pass over the pairs [begin, end) of each span's sequence; hidden [N, hidden]."""
        requests, begins, counts = (
            torch.tensor(column, device=self.device)
            for column in zip(*((i, b, e - b) for i, b, e in spans), strict=True)
        )
        owner, local = spread(counts)
        position = begins[owner] + local
        slots = layout.slots(requests[owner], position)
        tokens = [t for i, b, e in spans for t in sequences[i].tokens[b + 1 : e + 1]]
        mask = local[:, None] >= torch.arange(int(counts.max()), device=self.device)
        view = layout.view(slots, counts, begins, counts, mask, requests)
        features = drafter.project(self.cache.features[slots])
        return drafter.forward(torch.tensor(tokens, device=self.device), features, position, self.cache, view)

    @torch.inference_mode()
    def verify(self, batch: Batch, selection: Selection, layout: Layout) -> Verified:
        """One target pass over the flattened super-tree and the prompt chunks."""
        tree = flatten(batch, selection, layout)
        taps = self.drafter.taps if self.drafter else ()
        hidden, features = self.target.forward(tree.tokens, tree.positions, self.cache, tree.view, taps)
        if features is not None:
            self.cache.features[tree.view.slots] = features
        return Verified(tree, self._logits(tree, hidden))

    def _logits(self, tree: SuperTree, hidden: torch.Tensor) -> Callable[[Seq[int]], torch.Tensor]:
        """Logits of every row that `accept` could ask for, computed in one product."""
        first_chunk = max(tree.children.values(), default=-1) + 1
        rows = sorted({*range(first_chunk), *tree.roots})
        place = {row: i for i, row in enumerate(rows)}
        logits = self.target.logits(hidden if len(rows) == len(hidden) else hidden[rows])

        def logits_of(wanted: Seq[int]) -> torch.Tensor:
            return logits[[place[row] for row in wanted]].float()

        return logits_of

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
