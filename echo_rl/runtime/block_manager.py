"""Keeps the books of the paged KV cache: the request that owns each block. Holds no tensor.

Admission reserves a request's worst case (prompt, all its new tokens, and the headroom that a tree
under verification needs), so a running request never waits for memory and is never preempted.
Blocks themselves are taken when they are needed.
"""

from __future__ import annotations

from collections.abc import Iterable

from echo_rl.errors import IntegrityError, KVExhausted
from echo_rl.runtime.sequence import Sequence


class BlockManager:
    """Owns the free list and the sum of reservations."""

    def __init__(self, blocks: int, block_size: int, headroom: int) -> None:
        self.total = blocks
        self.block_size = block_size
        self._headroom = headroom
        self._free = list(range(blocks - 1, -1, -1))
        self._reserved = 0

    @property
    def used_share(self) -> float:
        """Share of blocks in use, in [0, 1]."""
        return 1.0 - len(self._free) / self.total

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def worst_case(self, sequence: Sequence) -> int:
        """Blocks that the sequence may ever hold at once."""
        request = sequence.request
        return self.blocks_for(len(request.prompt) + request.params.max_new_tokens + self._headroom)

    def admit(self, sequence: Sequence) -> bool:
        """Reserve the worst case; False if it doesn't fit beside what is already promised."""
        need = self.worst_case(sequence)
        if self._reserved + need > self.total:
            return False
        sequence.reserved_blocks = need
        self._reserved += need
        return True

    def grow(self, sequence: Sequence, length: int) -> None:
        """Make `length` logical positions addressable. Raises `KVExhausted` past the reservation."""
        need = self.blocks_for(length) - len(sequence.blocks)
        if need <= 0:
            return
        if len(sequence.blocks) + need > sequence.reserved_blocks:
            raise KVExhausted(f"request {sequence.id} needs {length} KV positions, more than it reserved at admission")
        taken = self._free[-need:][::-1]
        del self._free[-need:]
        sequence.blocks.extend(taken)

    def trim(self, sequence: Sequence, length: int) -> None:
        """Give back the blocks past `length` logical positions."""
        keep = self.blocks_for(length)
        self._free.extend(reversed(sequence.blocks[keep:]))
        del sequence.blocks[keep:]

    def release(self, sequence: Sequence) -> None:
        """Give back everything the sequence holds or was promised."""
        self.trim(sequence, 0)
        self._reserved -= sequence.reserved_blocks
        sequence.reserved_blocks = 0

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Check the conservation law: every block is free or owned by exactly one live sequence, every
        committed token has a block, and promises fit the pool. Raises `IntegrityError`."""
        sequences = list(sequences)
        owned = [block for sequence in sequences for block in sequence.blocks]
        if sorted(owned + self._free) != list(range(self.total)):
            raise IntegrityError(
                f"{len(owned)} owned + {len(self._free)} free blocks are not a partition of {self.total}"
            )
        if self._reserved != sum(s.reserved_blocks for s in sequences) or self._reserved > self.total:
            raise IntegrityError(f"{self._reserved} blocks are promised; live sequences account for another number")
        for s in sequences:
            if s.kv_len > len(s.blocks) * self.block_size or len(s.blocks) > s.reserved_blocks:
                raise IntegrityError(
                    f"sequence {s.id}: {s.kv_len} tokens in {len(s.blocks)} of {s.reserved_blocks} blocks"
                )
            if not 0 <= s.draft_len <= s.kv_len <= len(s.tokens):
                raise IntegrityError(
                    f"sequence {s.id}: draft {s.draft_len} <= kv {s.kv_len} <= {len(s.tokens)} is broken"
                )
