"""Holds the settings of a drafter's training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from echo_rl.errors import ConfigError


@dataclass(frozen=True)
class TrainConfig:
    """The settings by which a drafter is trained."""

    data: str
    """Folder of conversation shards."""
    features: str
    """Folder of cached features of those shards."""
    out: str
    """Folder of the drafter: best checkpoint, manifest, training state, TensorBoard events."""
    start: str | None = None
    """EAGLE-3 folder of a drafter to go on from; None starts anew."""
    draft_vocab: int = 8192
    """Tokens that the drafter can propose, the most frequent ones of the conversations."""
    kv_heads: int = 9
    """Key/value heads; as many as query heads lets the warm start carry the whole embedding."""
    self_heads: int = 6
    """Heads that the warm start makes attend to their own position."""
    intermediate: int = 1536
    """Width of the MLP."""
    updates: int = 4000
    """Optimiser steps in all."""
    batch_tokens: int = 2400
    """Tokens a batch, prompts included."""
    unroll: int = 3
    """Drafted levels trained at first."""
    final_unroll: int = 5
    """Drafted levels trained towards the end, when the first levels are good."""
    final_share: float = 0.4
    """Share of the updates that use `final_unroll`."""
    level_decay: float = 0.85
    """Weight of each level's loss relative to the one before."""
    hard_share: float = 0.3
    """Share of the target's argmax in the labels; the rest is its distribution."""
    columns: int = 3072
    """Draft ids that one batch's loss is computed on (5/6 likeliest, 1/6 sampled)."""
    output_levels: int = 1
    """Levels whose loss trains `lm_head`; later ones only pass through it."""
    lr: float = 1.5e-3
    """Peak rate of Muon (scaled to AdamW's update size) and of the norms."""
    output_lr: float = 5e-4
    """Peak rate of `lm_head`."""
    warmup: int = 30
    """Updates of linear warm-up; afterwards the rate falls linearly to 2 % of its peak."""
    regression_rows: int = 150_000
    """Rows that the closed-form warm start fits; 0 starts from random weights."""
    validation: int = 60
    """Held-out conversations with greedy answers."""
    evaluate_every: int = 250
    """Updates between validations; the best checkpoint is kept."""
    checkpoint_every: int = 50
    """Updates between saved training states."""
    rope_theta: float = 100_000.0
    """Rotary base, the target's."""
    eps: float = 1e-5
    """RMS norm epsilon, the target's."""
    max_positions: int = 2048
    """Longest context."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the forward and backward passes; master weights are float32."""
    seed: int = 0
    """Seed of batches, sampled columns and the held-out set."""

    def __post_init__(self) -> None:
        if min(self.updates, self.batch_tokens, self.unroll, self.final_unroll, self.columns) < 1:
            raise ConfigError("updates, batch_tokens, unroll, final_unroll and columns must be at least 1")
        if min(self.evaluate_every, self.checkpoint_every) < 1:
            raise ConfigError("evaluate_every and checkpoint_every must be at least 1")
        if min(self.validation, self.draft_vocab, self.kv_heads, self.intermediate, self.max_positions) < 1:
            raise ConfigError("validation, draft_vocab, kv_heads, intermediate, max_positions must be at least 1")
        if min(self.self_heads, self.warmup, self.output_levels, self.regression_rows) < 0:
            raise ConfigError("self_heads, warmup, output_levels and regression_rows must not be negative")
        if not all(0 < value < math.inf for value in (self.lr, self.output_lr, self.rope_theta, self.eps)):
            raise ConfigError("lr, output_lr, rope_theta and eps must be positive and finite")
        if self.precision not in ("bfloat16", "float32"):
            raise ConfigError(f"precision is {self.precision}; it must be bfloat16 or float32")
        if not (0 <= self.final_share <= 1 and 0 <= self.hard_share <= 1 and self.level_decay > 0):
            raise ConfigError("final_share and hard_share must lie in [0, 1], level_decay be positive")

    def levels_at(self, update: int) -> int:
        return self.final_unroll if update >= round(self.updates * (1 - self.final_share)) else self.unroll

    def rate_at(self, update: int) -> float:
        """Learning rate of an update as a share of its peak."""
        return min(1.0, (update + 1) / max(self.warmup, 1)) * (1 - 0.98 * update / self.updates)
