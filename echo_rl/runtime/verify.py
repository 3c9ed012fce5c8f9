"""Flattened super-tree verification: one row a token, whole batch in one pass, no padding; then `accept`.

Row order: for each decoding request its root and its selected nodes, then each prompt chunk.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from echo_rl.contracts import SamplingParams, Selection, TokenLogprob, Verdict
from echo_rl.runtime.kv_cache import AttentionView
from echo_rl.runtime.layout import Layout, spread
from echo_rl.runtime.sampling import draw, likelihood
from echo_rl.runtime.scheduler import Batch


@dataclass(frozen=True)
class SuperTree:
    """The flattened batch, ready for one forward pass. N rows, Q requests that sample."""

    tokens: torch.Tensor  # [N]
    positions: torch.Tensor  # [N] rotary positions
    view: AttentionView
    roots: tuple[int, ...]  # [Q] the row whose logits decide each sampling request's next token
    children: dict[tuple[int, int], int]  # (parent row, token) -> row


def flatten(batch: Batch, selection: Selection, layout: Layout) -> SuperTree:
    """Lay the batch's roots, selected nodes and prompt chunks out as rows."""
    counts, owner, local, start = _rows(batch, selection, layout)
    nodes = int((selection.counts + 1).sum()) if batch.decodes else 0  # rows that belong to trees
    parents, depth = _tree_rows(selection, local[:nodes])
    parent_rows = parents + start[owner[:nodes]]
    tokens = _tokens(batch, selection, local[:nodes], layout)
    kv = layout.kv_lens
    positions = kv[owner] + torch.cat([depth, local[nodes:]])
    mask = _mask(parent_rows, depth, local, int(counts.max()))
    slots = layout.slots(owner, kv[owner] + local)
    ends = start + counts - 1
    finishing = [len(batch.decodes) + i for i, chunk in enumerate(batch.chunks) if chunk.last]
    roots = start[: len(batch.decodes)].tolist() + ends[finishing].tolist()
    tree = zip(parent_rows.tolist(), tokens[:nodes].tolist(), local[:nodes].tolist(), strict=True)
    children = {(parent, token): row for row, (parent, token, place) in enumerate(tree) if place}
    return SuperTree(tokens, positions, layout.view(slots, counts, kv, counts, mask), tuple(roots), children)


def _rows(batch: Batch, selection: Selection, layout: Layout) -> tuple[torch.Tensor, ...]:
    chunks = torch.tensor([chunk.count for chunk in batch.chunks], dtype=torch.int64, device=layout.device)
    counts = torch.cat([selection.counts + 1, chunks])  # [R]
    owner, local = spread(counts)
    return counts, owner, local, counts.cumsum(0) - counts


def _tree_rows(selection: Selection, local: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Parent (local row, roots point at themselves) and depth (0 = root) of every tree row."""
    parents, depth = torch.zeros_like(local), torch.zeros_like(local)
    parents[local > 0] = selection.parents + 1
    depth[local > 0] = selection.depths + 1
    return parents, depth


def _tokens(batch: Batch, selection: Selection, local: torch.Tensor, layout: Layout) -> torch.Tensor:
    tree = torch.empty_like(local)
    tree[local > 0] = selection.tokens
    tree[local == 0] = layout.tensor(np.array([s.tokens[-1] for s in batch.decodes], dtype=np.int64))
    prompt = [t for c in batch.chunks for t in c.sequence.tokens[c.sequence.kv_len : c.sequence.kv_len + c.count]]
    return torch.cat([tree, layout.tensor(np.array(prompt, dtype=np.int64))])


def _mask(parent_rows: torch.Tensor, depth: torch.Tensor, local: torch.Tensor, width: int) -> torch.Tensor:
    """[N, W]: tree rows see their ancestors and themselves, prompt rows see the chunk so far."""
    nodes = len(parent_rows)
    mask = local[:, None] >= torch.arange(width, device=local.device)
    if nodes:
        mask[:nodes] = False
        rows = torch.arange(nodes, device=local.device)
        ancestor = rows
        for _ in range(int(depth.max()) + 1):
            mask[rows, local[ancestor]] = True
            ancestor = parent_rows[ancestor]
    return mask


@dataclass(frozen=True)
class RowLogits:
    """The target's logits of those rows of a pass that may decide a token."""

    values: torch.Tensor  # [P, V]
    place: dict[int, int]  # row of the pass -> row of `values`


def accept(
    tree: SuperTree,
    logits: RowLogits,
    params: Seq[SamplingParams],
    positions: Seq[int],
    logprobs: Seq[int | None] = (),
) -> Verdict:
    """Walk each tree from its root: while a child is the token that belongs there, accept it; else
    that token is the bonus. Pure: a function of the tree, the rows' logits and the sampling keys.

    `params` [Q]; `positions` [Q], where each request's next token goes; `logprobs` [Q],
    alternatives to report with each token (None: nothing).
    """
    current = list(tree.roots)
    accepted: list[list[int]] = [[] for _ in current]
    tokens: list[list[int]] = [[] for _ in current]
    likelihoods: dict[int, list[TokenLogprob]] = {q: [] for q, n in enumerate(logprobs) if n is not None}
    failed: set[int] = set()
    active = list(range(len(current)))
    while active:
        places = [positions[q] + len(tokens[q]) for q in active]
        rows = [logits.place[current[q]] for q in active]
        drawn = draw(logits.values, rows, [params[q] for q in active], places)
        walking = []
        for i, (q, token, finite) in enumerate(zip(active, drawn.tokens.tolist(), drawn.finite.tolist(), strict=True)):
            if not finite:
                failed.add(q)
                continue
            tokens[q].append(token)
            if q in likelihoods:
                likelihoods[q].append(likelihood(logits.values[rows[i]].float(), token, logprobs[q] or 0))
            child = tree.children.get((current[q], token))
            if child is not None:
                accepted[q].append(child - tree.roots[q] - 1)
                current[q] = child
                walking.append(q)
        active = walking
    reported = tuple(tuple(likelihoods.get(q, ())) for q in range(len(tokens))) if likelihoods else ()
    return Verdict(tuple(map(tuple, accepted)), tuple(map(tuple, tokens)), frozenset(failed), reported)
