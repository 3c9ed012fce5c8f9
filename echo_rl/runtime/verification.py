"""Verifies the flattened super-tree: one row a token, whole batch in one pass, no padding; then `accept`.

Row order: for each decoding request its root and its selected nodes, then each prompt chunk. The rows are
laid out on the host, whose dictionary of children decides what is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from echo_rl.contracts import SamplingParams, Selection, TokenLogprob, Verdict
from echo_rl.runtime.kv_cache import AttentionView
from echo_rl.runtime.layout import Layout, ragged_rows
from echo_rl.runtime.sampling import draw, token_logprob
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
    trees, chunks, depths = len(batch.decodes), batch.chunks, selection.depths.tolist()
    counts = [count + 1 for count in selection.counts.tolist()] + [chunk.count for chunk in chunks]  # [R]
    owner, local, starts = ragged_rows(counts)  # [N], [N], [R + 1]
    nodes = selection.size + trees  # rows that belong to trees
    below = local[:nodes].nonzero()[0]  # [K] the selected nodes' rows
    tokens = np.empty(len(owner), dtype=np.int64)
    tokens[starts[:trees]] = [s.tokens[-1] for s in batch.decodes]
    tokens[below] = selection.tokens.cpu().numpy()
    tokens[nodes:] = [t for c in chunks for t in c.sequence.tokens[c.sequence.kv_len : c.sequence.kv_len + c.count]]
    depth = local.copy()  # positions after the request's committed tokens: of a tree's root 0
    depth[below] = [above + 1 for above in depths]
    parent_rows = np.arange(nodes)  # roots point at themselves
    parent_rows[below] = selection.parents.cpu().numpy() + 1 + starts[owner[below]]
    committed = layout.host_kv_lens[owner]
    mask = layout.tensor(_mask(parent_rows, max(depths, default=-1) + 1, local, max(counts)))
    view = layout.host_view(layout.host_slots(owner, committed + local), starts, layout.host_kv_lens, counts, mask)
    finishing = [r for r, chunk in enumerate(chunks, trees) if chunk.last]
    roots = starts[:trees].tolist() + [int(starts[r + 1]) - 1 for r in finishing]
    edges = zip(parent_rows[below].tolist(), tokens[below].tolist(), strict=True)
    children = dict(zip(edges, below.tolist(), strict=True))
    return SuperTree(layout.tensor(tokens), layout.tensor(committed + depth), view, tuple(roots), children)


def _mask(parent_rows: np.ndarray, depth: int, local: np.ndarray, width: int) -> np.ndarray:
    """[N, W]: tree rows see their ancestors and themselves, prompt rows see the chunk so far.

    `depth` is that of the deepest tree row, roots having 0.
    """
    nodes = len(parent_rows)
    mask: np.ndarray = local[:, None] >= np.arange(width)
    mask[:nodes] = False
    ancestor = rows = np.arange(nodes)
    for _ in range(depth + 1):
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
        for i, (q, token, logit) in enumerate(zip(active, drawn.tokens.tolist(), drawn.best.tolist(), strict=True)):
            if not math.isfinite(logit):
                failed.add(q)
                continue
            tokens[q].append(token)
            if q in likelihoods:
                likelihoods[q].append(token_logprob(logits.values[rows[i]].float(), token, logprobs[q] or 0))
            child = tree.children.get((current[q], token))
            if child is not None:
                accepted[q].append(child - tree.roots[q] - 1)
                current[q] = child
                walking.append(q)
        active = walking
    reported = tuple(tuple(likelihoods.get(q, ())) for q in range(len(tokens))) if likelihoods else ()
    return Verdict(tuple(map(tuple, accepted)), tuple(map(tuple, tokens)), frozenset(failed), reported)
