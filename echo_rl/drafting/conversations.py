"""Keeps conversations as token shards on disk, and chooses the draft vocabulary from them.

A shard is one ``.npz`` with ``tokens`` (all conversations end to end), ``offsets`` [n + 1], ``starts`` [n] (index
*within* each conversation of the first token of the assistant's answer) and ``greedy`` [n]. Knows no tokenizer.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echo_rl.errors import ConfigError
from echo_rl.utils.files import replacing
from echo_rl.utils.result_store import digest_of, read_json

SYNTHESIS = "synthesis.json"
"""The file, beside conversations, of the settings by which they were made."""


@dataclass(frozen=True)
class Conversations:
    """Conversations end to end. Conversation i is ``tokens[offsets[i]:offsets[i + 1]]``."""

    tokens: NDArray[np.int64]  # [T]
    offsets: NDArray[np.int64]  # [n + 1]
    starts: NDArray[np.int64]  # [n] where the answer begins, relative to the conversation
    greedy: NDArray[np.bool_]  # [n] the answer is the target's argmax at every position

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    @property
    def digest(self) -> str:
        """`digest_of` all four arrays."""
        return digest_of(*(part.tobytes() for part in (self.tokens, self.offsets, self.starts, self.greedy)))

    @classmethod
    def of(cls, items: Sequence[tuple[Sequence[int], int, bool]]) -> Conversations:
        """Conversations made of (tokens, start of the answer, greedy) triples."""
        offsets = np.cumsum([0] + [len(tokens) for tokens, _, _ in items]).astype(np.int64)
        flat = np.concatenate([np.asarray(tokens, dtype=np.int64) for tokens, _, _ in items] or [np.zeros(0, np.int64)])
        starts = np.array([start for _, start, _ in items], dtype=np.int64)
        return cls(flat, offsets, starts, np.array([greedy for _, _, greedy in items], dtype=bool))

    def save(self, path: Path) -> None:
        """Write atomically; tokens take 2 bytes where the vocabulary allows."""
        compact = self.tokens.astype(np.uint16 if self.tokens.max(initial=0) < 2**16 else np.uint32)
        with replacing(path) as part, open(part, "wb") as file:
            np.savez(file, tokens=compact, offsets=self.offsets, starts=self.starts, greedy=self.greedy)

    @classmethod
    def load(cls, path: Path) -> Conversations:
        """Read one shard. Raises `ConfigError` where it is damaged, a field is missing or offsets do not add up."""
        try:
            with np.load(path) as data:
                arrays = {name: data[name] for name in data.files}
        except (BadZipFile, EOFError, ValueError, zlib.error) as error:
            raise ConfigError(f"{path} is damaged ({error}); delete it and generate it again") from error
        missing = {"tokens", "offsets", "starts"} - arrays.keys()
        if missing:
            raise ConfigError(f"{path} lacks {sorted(missing)}; it is not a conversation shard")
        tokens, offsets, starts = (arrays[name].astype(np.int64) for name in ("tokens", "offsets", "starts"))
        out = cls(tokens, offsets, starts, arrays.get("greedy", np.ones(len(starts))).astype(bool))
        if len(out.offsets) != len(out) + 1 or out.offsets[-1] != len(out.tokens):
            raise ConfigError(f"{path} is damaged: its offsets do not match its tokens; generate it again")
        return out


def shards(folder: str | Path) -> list[Path]:
    """The conversation shards of a folder in order. Raises `ConfigError` where there is none."""
    found = sorted(Path(folder).glob("*.npz"))
    if not found:
        raise ConfigError(f"no conversation shards (*.npz) in {folder}; run the synthesis first")
    return found


def synthesis(folder: str | Path) -> dict[str, Any] | None:
    """The settings by which a folder's conversations were made, prompts' files by their sha256; None where it doesn't
    say. Raises `ConfigError` where the file is damaged."""
    path = Path(folder) / SYNTHESIS
    found: dict[str, Any] | None = read_json(path) if path.is_file() else None
    return found


def check_conversations(conversations: Iterable[Conversations], vocab: int, positions: int) -> None:
    """Raise `ConfigError` for a token that is none of the target's `vocab`, or more tokens than `positions` in one."""
    for shard in conversations:
        low, high = shard.tokens.min(initial=0), shard.tokens.max(initial=0)
        if low < 0 or high >= vocab:
            raise ConfigError(
                f"the conversations hold token {low if low < 0 else high}, the target's are 0..{vocab - 1}; train on "
                "conversations that this target wrote"
            )
        longest = shard.lengths.max(initial=0)
        if longest > positions:
            raise ConfigError(
                f"a conversation has {longest} tokens; raise max_positions, which is {positions}, to that"
            )


def token_counts(conversations: Iterable[Conversations], vocab: int) -> NDArray[np.int64]:
    """[vocab] how often each token occurs, in questions too: answers to new questions take up their words."""
    counts = np.zeros(vocab, dtype=np.int64)
    for shard in conversations:
        counts += np.bincount(shard.tokens, minlength=vocab)
    return counts


def choose_vocabulary(counts: NDArray[np.int64], size: int, always: Sequence[int] = ()) -> tuple[Tensor, float]:
    """The `size` most frequent tokens (ties by id) with `always` among them.

    Returns ([size] ascending target ids, share of the counted tokens that they cover).
    """
    if not len(set(always)) <= size <= len(counts):
        raise ConfigError(f"draft vocabulary of {size} must lie in {len(set(always))}..{len(counts)}")
    weight = counts.astype(np.float64)
    weight[list(always)] = np.inf
    ids = np.sort(np.argsort(-weight, kind="stable")[:size])
    return torch.from_numpy(ids), float(counts[ids].sum() / max(counts.sum(), 1))
