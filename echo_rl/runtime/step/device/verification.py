"""Verifies without the host: the target's pass over the super-tree, every row's token, the walk, the moves.

The same decisions as `echo_rl.runtime.verification.accept` makes and `Runner.keep` carries out. Shapes: B
requests, N tree rows, T prompt rows of P requests, D levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from echo_kernels.device_interface import TreeRows, Walk
from echo_kernels.device_ops import DeviceOps
from echo_rl.runtime.filtering import dropped_tokens
from echo_rl.runtime.kv_cache import AttentionView, KVCache
from echo_rl.runtime.layout import Pages
from echo_rl.runtime.models.target import Target
from echo_rl.runtime.step.device.buckets import Bucket
from echo_rl.runtime.step.device.inputs import Drawing, Given, Prompts


class Verification:
    """The target, the cache and the decisions, bound once. `taps` are the layers that the drafter reads."""

    def __init__(self, target: Target, taps: tuple[int, ...], cache: KVCache, spare: int, decisions: DeviceOps) -> None:
        self._target, self._taps, self._cache, self._spare = target, taps, cache, spare
        self._decisions = decisions

    def run(self, given: Given, rows: TreeRows, prompts: Prompts | None, bucket: Bucket) -> tuple[Walk, Walk | None]:
        """The walks that accept nodes of the trees, and those that draw the first tokens of prompts that end."""
        hidden = self._forward(given, rows, prompts)
        count = len(rows.tokens)
        walk = self._walk(hidden[:count], rows, given.drawing, bucket)
        self._keep(given.pages, walk)
        if prompts is None or not len(prompts.ends):
            return walk, None
        ends = hidden[count + prompts.ends]
        return walk, self._walk(ends, single_rows(prompts.ends), prompts.drawing, bucket, walked=0)

    def _forward(self, given: Given, rows: TreeRows, prompts: Prompts | None) -> Tensor:
        """[N + T, hidden] before the final norm; keys, values and features of all rows written."""
        tokens, positions, view = self._tree(given, rows)
        if prompts is not None:
            tokens, positions = torch.cat([tokens, prompts.tokens]), torch.cat([positions, prompts.positions])
            view = self._with_prompts(given, view, prompts)
        hidden, features = self._target.forward(tokens, positions, self._cache, view, self._taps)
        if features is not None:
            self._cache.features[view.slots] = features
        return hidden

    def _tree(self, given: Given, rows: TreeRows) -> tuple[Tensor, Tensor, AttentionView]:
        """Tokens, rotary positions and view of the tree rows; padding rows belong to one more request, an empty one."""
        lengths, batch = given.pages.kv_lens, len(given.roots)
        owner = rows.owner.clamp(min=0).long()
        place = torch.arange(len(owner), device=owner.device)
        padding_row = (rows.owner < 0) | (lengths == 0)[owner]
        context = lengths[owner].masked_fill(padding_row, 0)
        local = (place - rows.starts[owner]).masked_fill(padding_row, 0)
        slots = given.pages.slots(owner, context + local).masked_fill(padding_row, self._spare)
        counts = rows.starts.diff()
        padding = len(owner) - rows.starts[-1:]
        none = padding * 0
        pages = Pages(given.all_tables[: batch + 1], lengths, given.pages.block_size)
        view = pages.view(
            slots, torch.cat([counts, padding]), torch.cat([lengths, none]),
            torch.cat([counts * (lengths > 0), none]), rows.mask,
        )  # fmt: skip
        return rows.tokens, context + rows.depths, view

    def _with_prompts(self, given: Given, tree: AttentionView, prompts: Prompts) -> AttentionView:
        """The view with the prompt rows behind it, each seeing its chunk so far."""
        requests, count = len(tree.ctx_lens), len(tree.slots)
        width = max(tree.mask.shape[1], prompts.longest)
        mask = tree.mask.new_zeros(count + len(prompts.tokens), width)
        mask[:count, : tree.mask.shape[1]] = tree.mask
        mask[count:] = prompts.local[:, None] >= torch.arange(width, device=mask.device)
        context = prompts.context.int()
        return AttentionView(
            torch.cat([tree.slots, prompts.slots]), given.all_tables[: requests + len(context)], tree.block_size,
            torch.cat([tree.q_start, count + prompts.counts.cumsum(0).int()]), torch.cat([tree.ctx_lens, context]),
            torch.cat([tree.kv_lens, context + prompts.counts.int()]), mask,
        )  # fmt: skip

    def _walk(
        self, hidden: Tensor, rows: TreeRows, drawing: Drawing, bucket: Bucket, walked: int | None = None
    ) -> Walk:
        """Every row's token and the walk, `walked` nodes deep (None: the bucket's depth)."""
        logits = self._target.logits(hidden)
        if bucket.filtered:
            owner = rows.owner.clamp(min=0).long()
            temperatures = drawing.keys.temperatures[owner]
            scaled = logits.float() / temperatures.masked_fill(temperatures == 0, 1.0)[:, None]
            logits = logits.masked_fill(
                dropped_tokens(scaled, drawing.top_k[owner], drawing.top_p[owner]), float("-inf")
            )
        return self._decisions.verify_tree(logits, rows, drawing.keys, bucket.depth if walked is None else walked)

    def _keep(self, pages: Pages, walk: Walk) -> None:
        """Move the accepted nodes' keys, values and features behind their roots."""
        depth = walk.accepted.shape[1]
        if not depth:
            return
        place = torch.arange(depth, device=walk.accepted.device)
        stays = (place >= walk.lengths[:, None]) | (walk.accepted == place)  # [B, D]
        after = pages.kv_lens[:, None] + 1
        owner = torch.arange(len(after), device=place.device)[:, None].expand(-1, depth).reshape(-1)

        def slots(node: Tensor) -> Tensor:
            logical = (after + node).masked_fill(stays, 0).reshape(-1)
            return pages.slots(owner, logical).masked_fill(stays.reshape(-1), self._spare)

        self._cache.compact(slots(walk.accepted), slots(place))


def single_rows(tokens: Tensor) -> TreeRows:
    """[R] tokens as R trees of a root each."""
    count = len(tokens)
    row = torch.arange(count + 1, dtype=torch.int32, device=tokens.device)
    mask = torch.ones(count, 1, dtype=torch.bool, device=tokens.device)
    return TreeRows(tokens, row[:count], torch.zeros_like(row[:count]), row[:count], mask, row)
