"""Samples by position-keyed coupling: the token at a position depends on (logits, seed, position) alone.

token = argmax(filtered logits / T + Gumbel(seed, position)), T = 0 being the plain argmax. Whoever
proposes tokens has no influence, which makes verification lossless by construction (see `verification.accept`).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from echo_kernels import ops_for
from echo_rl.contracts import SamplingParams, TokenLogprob
from echo_rl.runtime.filtering import dropped_tokens


@dataclass(frozen=True)
class Draw:
    """The token that was drawn for each row."""

    tokens: torch.Tensor  # [R] int64
    best: torch.Tensor  # [R] float32, the row's highest logit: finite only where the row's logits can be used


def draw(logits: torch.Tensor, rows: Seq[int], params: Seq[SamplingParams], positions: Seq[int]) -> Draw:
    """Draw the token that belongs at each row's position. `logits` is [N, V] of any float dtype, R rows of it count."""
    ops, at = ops_for(logits.device), torch.tensor(rows, device=logits.device)
    tokens, best = ops.best_token(logits, at)
    noisy = [i for i, p in enumerate(params) if p.drawn_at > 0]
    if noisy:
        chosen = [params[i] for i in noisy]
        temperatures = torch.tensor([[p.drawn_at] for p in chosen], device=logits.device)
        scaled = logits[at[noisy]].float() / temperatures
        seeds = torch.tensor([p.seed for p in chosen], device=logits.device)
        keys = torch.tensor([positions[i] for i in noisy], device=logits.device)
        noise = ops.gumbel(seeds, keys, logits.shape[1], logits.device)
        tokens[noisy] = (_filtered(scaled, chosen) + noise).argmax(dim=1)
    return Draw(tokens, best)


def _filtered(logits: torch.Tensor, params: Seq[SamplingParams]) -> torch.Tensor:
    """Logits with everything outside top-k and top-p at -inf."""
    if all(p.top_k == 0 and p.top_p >= 1.0 for p in params):
        return logits
    top_k = torch.tensor([p.top_k or logits.shape[1] for p in params], device=logits.device)
    top_p = logits.new_tensor([p.top_p if p.top_p < 1.0 else float("inf") for p in params])
    return logits.masked_fill(dropped_tokens(logits, top_k, top_p), float("-inf"))


def token_logprob(logits: torch.Tensor, token: int, alternatives: int) -> TokenLogprob:
    """A token's log-probability, and the likeliest tokens with theirs. `logits` is [V], float32."""
    log_probs = logits.log_softmax(0)
    best = log_probs.topk(min(alternatives, len(logits)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token, float(log_probs[token]), top)
