"""Runs the EAGLE-3 drafter over flattened rows: one decoder layer that reads target features.

Row i takes the pair (feature of token i, embedding of token i + 1) and predicts token i + 2. Below
the committed tokens the feature is the target's (`project`ed taps); in the tree it is the drafter's
own hidden state of the parent row. Source: EAGLE-3 (arXiv 2503.01840). Knows nothing about trees.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from echo_rl.runtime.drafters.folder import DrafterConfig, draft_to_target, load_drafter
from echo_rl.runtime.kv_cache import AttentionView, KVCache
from echo_rl.runtime.models.architecture import rope_table
from echo_rl.runtime.models.linear import Linear
from echo_rl.runtime.models.target import Target


class Drafter:
    """A loaded drafter, bound to the target whose embeddings it uses."""

    def __init__(
        self,
        config: DrafterConfig,
        tensors: dict[str, torch.Tensor],
        target: Target,
        positions: int,
        *,
        int8: bool = False,
    ) -> None:
        config.check_target(hidden=target.arch.hidden, vocab=target.arch.vocab, layers=target.arch.layers)
        self.config = config
        self.ops = target.ops
        self.embed = target.embed
        device, dtype = target.embed.device, target.embed.dtype
        w = {name: t.to(device=device, dtype=dtype) for name, t in tensors.items() if t.is_floating_point()}
        self._fc = Linear(w["fc.weight"])  # reads raw states, whose outliers eight bits would drown
        linear = partial(Linear, int8=int8)
        self._embed_norm = w["midlayer.input_layernorm.weight"]
        self._feature_norm = w["midlayer.hidden_norm.weight"]
        q, k, v = (w[f"midlayer.self_attn.{p}_proj.weight"] for p in "qkv")
        self._qkv, self._kv = linear(torch.cat([q, k, v])), linear(torch.cat([k, v]))
        self._out = linear(w["midlayer.self_attn.o_proj.weight"])
        self._post_norm = w["midlayer.post_attention_layernorm.weight"]
        self._gate_up = linear(torch.cat([w["midlayer.mlp.gate_proj.weight"], w["midlayer.mlp.up_proj.weight"]]))
        self._down = linear(w["midlayer.mlp.down_proj.weight"])
        self._norm = w["norm.weight"]
        self._lm_head = linear(w["lm_head.weight"])
        self.vocabulary = draft_to_target(tensors["d2t"]).to(device)  # [V'] target ids
        cos, sin = rope_table(config.head_dim, config.rope_theta, positions)
        self._cos, self._sin = cos.to(device), sin.to(device)

    @classmethod
    def load(cls, folder: Path, target: Target, positions: int, *, int8: bool = False) -> Drafter:
        """`int8`: products in eight bits where the device has them, see `Linear`.

        Raises `WeightsError` (damaged) or `DrafterMismatch` (made for another target).
        """
        config, tensors = load_drafter(folder, target_layers=target.arch.layers)
        return cls(config, tensors, target, positions, int8=int8)

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers after which the features are taken."""
        return self.config.taps

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """[N, 3 * target hidden] -> [N, hidden]."""
        return self._fc(features)

    def forward(
        self,
        tokens: torch.Tensor,  # [N] int64
        features: torch.Tensor,  # [N, hidden], overwritten
        positions: torch.Tensor,  # [N] int64
        cache: KVCache,
        view: AttentionView,
        wanted: torch.Tensor | None = None,  # [W] int64, rising; all rows by default
    ) -> torch.Tensor:
        """[W, hidden], before the final norm: the wanted rows' features for their children.

        The other rows leave their keys and values behind, no more: `view.slots` has N rows, the rest of
        the view is of the wanted ones.
        """
        ops = self.ops
        x = self._input(tokens, features)
        q = ops.rope_store(
            self._qkv(x), self._cos, self._sin, positions, view.slots,
            cache.draft_k, cache.draft_v, self.config.heads,
        )  # fmt: skip
        if wanted is not None:
            q, features = q.index_select(0, wanted), features.index_select(0, wanted)
        attended = ops.tree_attention(
            q, cache.draft_k, cache.draft_v, view.block_tables, view.block_size,
            view.q_start, view.ctx_lens, view.kv_lens, view.mask, self.config.head_dim**-0.5,
        )  # fmt: skip
        x, residual = ops.add_rms_norm(self._out(attended.flatten(1)), features, self._post_norm, self.config.eps)
        return residual + self._down(ops.silu_mul(self._gate_up(x)))

    def absorb(
        self, tokens: torch.Tensor, features: torch.Tensor, positions: torch.Tensor, cache: KVCache, slots: torch.Tensor
    ) -> None:
        """Keys and values of rows whose output nobody needs; arguments as `forward`'s, slots [N].

        One layer's keys and values depend on their own row alone, so this is all that a committed
        pair other than the last leaves behind.
        """
        self.ops.rope_store(
            self._kv(self._input(tokens, features)), self._cos, self._sin, positions, slots,
            cache.draft_k, cache.draft_v, 0,
        )  # fmt: skip

    def _input(self, tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """[N, 2 * hidden]: the normed embedding beside the normed feature."""
        ops, eps = self.ops, self.config.eps
        embedded = ops.rms_norm(F.embedding(tokens, self.embed), self._embed_norm, eps)
        return torch.cat([embedded, ops.rms_norm(features, self._feature_norm, eps)], dim=1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden] before the final norm -> [N, V'] in the model's dtype; `vocabulary` names the columns."""
        return self._lm_head(self.ops.rms_norm(hidden, self._norm, self.config.eps))

    def top(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k most likely next tokens of each row: log-probabilities and target ids, both [N, k], best first."""
        log_probs, columns = self.ops.top_tokens(self.logits(hidden), min(k, len(self.vocabulary)))
        return log_probs, self.vocabulary.take(columns)
