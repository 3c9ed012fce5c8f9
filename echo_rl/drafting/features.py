"""Keeps the target's features of the conversations on disk, so that training never runs the target.

For every shard: ``taps.npy`` [T, taps * hidden] and ``final.npy`` [T, hidden], bfloat16 kept as int16 bits
(numpy has no bfloat16). `final` is the hidden state after the target's last norm: times the output embedding it
gives the logits, which is all that the soft labels need. Knows the target only as a callable.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor

from echo_rl.drafting.conversations import Conversations, shards
from echo_rl.errors import ConfigError
from echo_rl.utils.result_store import claim, read_json

CLAIM = "features.json"
Target = Callable[[Tensor], tuple[Sequence[Tensor], Tensor]]
"""[B, T] ids, right-padded -> (one [B, T, hidden] a tap, [B, T, hidden] after the final norm), causal attention."""


@dataclass(frozen=True)
class FeatureShard:
    """One shard's conversations beside the (memory-mapped) features of every token."""

    name: str
    conversations: Conversations
    taps: NDArray[np.int16]  # [T, taps * hidden], bfloat16 bits
    final: NDArray[np.int16]  # [T, hidden], bfloat16 bits

    def rows(self, index: int) -> tuple[Tensor, Tensor]:
        """bfloat16 ([L, taps * hidden], [L, hidden]) of conversation `index`."""
        span = slice(int(self.conversations.offsets[index]), int(self.conversations.offsets[index + 1]))
        taps, final = (torch.from_numpy(np.array(part[span])).view(torch.bfloat16) for part in (self.taps, self.final))
        return taps, final


def batches_by_length(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices grouped so that each padded group holds at most `tokens` tokens (or one long conversation)."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[index] <= tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


@torch.no_grad()
def _cache_shard(
    shard: Conversations, folder: Path, target: Target, tokens: int, advance: Callable[[int], None]
) -> None:
    written: dict[str, np.memmap[Any, np.dtype[np.int16]]] = {}
    for group in batches_by_length(shard.lengths.tolist(), tokens):
        ids = torch.zeros(len(group), int(shard.lengths[group].max()), dtype=torch.long)
        for row, index in enumerate(group):
            ids[row, : shard.lengths[index]] = torch.from_numpy(shard[index])
        taps, final = target(ids)
        for name, value in (("taps", torch.cat(list(taps), -1)), ("final", final)):
            if name not in written:
                size = (len(shard.tokens), value.shape[-1])
                written[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.int16, size)
            bits = value.to(torch.bfloat16).view(torch.int16).cpu().numpy()
            for row, index in enumerate(group):
                written[name][shard.offsets[index] : shard.offsets[index + 1]] = bits[row, : shard.lengths[index]]
        advance(int(shard.lengths[group].sum()))
    for array in written.values():
        array.flush()


def cache_features(
    data: str | Path, cache: str | Path, target: Target, taps: Sequence[int], model: str, tokens_per_batch: int = 4096
) -> Path:
    """Run the target once over every shard in `data`; finished shards are kept, so a rerun resumes.

    `model` tells this target from others, such as a digest of its weights. Raises `ConfigError` where the cache was
    made with other taps or of another model, or doesn't say (it was written before that was kept).
    """
    cache = Path(cache)
    claim(cache / CLAIM, {"taps": list(taps), "model": model}, "features", cache.glob("*/final.npy"))
    with Progress() as progress:
        for path in shards(data):
            shard, done = Conversations.load(path), cache / path.stem
            task = progress.add_task(path.stem, total=len(shard.tokens))
            if len(shard.tokens) and not done.exists():
                part = cache / f"{path.stem}.part"
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                _cache_shard(shard, part, target, tokens_per_batch, partial(progress.advance, task))
                os.replace(part, done)
            progress.update(task, completed=len(shard.tokens))
    return cache


def features_claim(cache: str | Path) -> dict[str, Any]:
    """`taps` and `model` of the features in a folder. Raises `ConfigError` where it doesn't say."""
    path = Path(cache) / CLAIM
    if not path.is_file():
        raise ConfigError(f"{cache} doesn't say what its features are of ({CLAIM} is missing); cache them in a new one")
    found: dict[str, Any] = read_json(path)
    return found


def open_features(data: str | Path, cache: str | Path) -> list[FeatureShard]:
    """Every shard whose features are complete. Raises `ConfigError` where there is none, or sizes differ."""
    out = []
    for path in shards(data):
        folder = Path(cache) / path.stem
        if not folder.exists():
            continue
        conversations = Conversations.load(path)
        if not len(conversations.tokens):
            continue
        taps, final = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("taps", "final"))
        if len(taps) != len(conversations.tokens):
            raise ConfigError(f"{folder} holds features of another {path.name}; delete it and cache again")
        out.append(FeatureShard(path.stem, conversations, taps, final))
    if not out:
        raise ConfigError(f"no cached features in {cache} for {data}; cache them first")
    return out
