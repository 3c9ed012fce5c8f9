"""Makes soft labels from the target and the cross-entropy that fits them.

The labels mix the target's distribution over the draft vocabulary (renormalised) with its argmax: the first gives the
tree its calibrated scores, the second is what greedy decoding accepts. The output layer dominates the cost of
training, so each batch uses only the columns that matter to it (`Columns`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def soft_labels(final: Tensor, output: Tensor, hard_share: float) -> Tensor:
    """[L, draft_vocab]: (1 - hard_share) * target distribution + hard_share * its argmax.

    final: [L, hidden] after the target's last norm; output: [draft_vocab, hidden] rows of its output embedding.
    """
    logits = final @ output.t()
    labels = torch.softmax(logits, -1).mul_(1 - hard_share)
    share = torch.full_like(labels[:, :1], hard_share)
    return labels.scatter_add_(1, logits.argmax(-1, keepdim=True), share)


@dataclass(frozen=True)
class Columns:
    """The draft ids that one batch's loss is computed on.

    The likeliest tokens under some label of the batch are all kept; of the rest, a uniform sample stands in for all,
    its logits raised by log(rest / sampled), so that the softmax denominator is right in expectation.
    """

    ids: Tensor  # [C] draft ids
    correction: Tensor  # [C] added to the logits
    place: Tensor  # [draft_vocab] index into `ids`, or -1

    @classmethod
    def choose(cls, labels: Tensor, count: int, generator: torch.Generator) -> Columns:
        """`count` columns (5/6 likeliest, up to 1/6 sampled), or all where `count` reaches the vocabulary."""
        vocab = labels.shape[1]
        order = labels.amax(0).float().argsort(descending=True)
        if count >= vocab:
            ids, correction = order, torch.zeros(vocab, dtype=labels.dtype)
        else:
            kept, rest = order[: count - count // 6], order[count - count // 6 :]
            sampled = rest[torch.randint(len(rest), (count // 6,), generator=generator)].unique()
            ids = torch.cat([kept, sampled])
            correction = torch.zeros(len(ids))
            correction[len(kept) :] = math.log(len(rest) / max(len(sampled), 1))
        place = torch.full((vocab,), -1, dtype=torch.long)
        place[ids] = torch.arange(len(ids))
        return cls(ids, correction.to(labels.dtype), place)

    def restrict(self, labels: Tensor) -> Tensor:
        """[L, C] the labels on these columns, renormalised."""
        chosen = labels[:, self.ids]
        return chosen / chosen.sum(-1, keepdim=True)


class SoftCrossEntropy(torch.autograd.Function):
    """``sum_r weight_r * CE(label_r, softmax(hidden_r @ output.T + correction))``.

    Gradients are computed in the forward pass from ``softmax - label``, so that no [R, C] tensor outlives it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, output: Tensor, labels: Tensor, weight: Tensor, correction: Tensor) -> Tensor:
        logits = (hidden @ output.t()).add_(correction)
        entropy = (torch.logsumexp(logits, -1).float() - (labels * logits).sum(-1).float()) @ weight
        error = torch.softmax(logits, -1).sub_(labels).mul_(weight[:, None].to(logits.dtype))
        to_output = error.t() @ hidden if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(error @ output, to_output)
        return entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        to_hidden, to_output = ctx.saved_tensors
        scale = grads[0].to(to_hidden.dtype)
        return to_hidden * scale, None if to_output is None else to_output * scale, None, None, None


def soft_cross_entropy(hidden: Tensor, output: Tensor, labels: Tensor, weight: Tensor, correction: Tensor) -> Tensor:
    """A scalar from hidden [R, H], output [C, H], labels [R, C], weight [R] and correction [C]."""
    out = SoftCrossEntropy.apply(hidden, output, labels, weight, correction)
    assert isinstance(out, Tensor)
    return out
