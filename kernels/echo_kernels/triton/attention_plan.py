"""Cuts attention into programs by what the host knows without asking the device."""

from __future__ import annotations

from dataclasses import dataclass

MIN_TILE, MAX_TILE = 16, 64
"""Query heads in a tile: the least that a matrix unit takes, the most whose sums fit the registers."""
TILE_BYTES = 16384
"""Bytes of keys, and of values, a step; twice both in flight fit the 64 KiB that the smallest device lends a
program."""
MASKED_KEYS = 32
"""Keys a step under the tree mask, whose loads take registers."""
MAX_SPLITS = 16
SPLIT_KEYS = 256
"""Keys below which a part of a request is not worth a program of its own."""


@dataclass(frozen=True)
class Plan:
    """One launch of attention. A tile is BLOCK_M pairs of a query row and one of its heads in a KV head's group."""

    rows: int
    """Query rows a tile."""
    block_m: int
    """Height of the tile, a power of two >= rows * group."""
    block_n: int
    """Keys a step where every row sees every key."""
    block_t: int
    """Keys a step under the tree mask. Divides block_n."""
    splits: int
    """Parts of a request's keys that run side by side; above 1 a second kernel combines them. A power of two."""
    warps: int
    stages: int


def plan_attention(
    rows: int, batch: int, group: int, kv_heads: int, width: int, max_keys: int, itemsize: int, processors: int
) -> Plan:
    """The plan for `rows` query rows of `batch` requests with `group` query heads a KV head.

    `width` is the head size rounded up to a power of two, `max_keys` an upper bound on the keys of a
    request, `processors` the number of programs that the device runs at once. Tiles are as tall as the mean
    request; keys are split while that leaves processors idle.
    """
    mean = -(-rows // batch) * group
    tallest = MIN_TILE if itemsize == 4 else MAX_TILE  # float32 products run outside the matrix units
    block_m = max(MIN_TILE, min(_power(mean), tallest), _power(group))
    tile_rows = block_m // group
    programs = max(batch, -(-rows // tile_rows)) * kv_heads
    block_n = max(MIN_TILE, min(MAX_TILE, TILE_BYTES // (itemsize * width)))
    splits = MAX_SPLITS
    while splits > 1 and (splits * programs > 2 * processors or splits * SPLIT_KEYS > max_keys):
        splits //= 2
    return Plan(
        rows=tile_rows,
        block_m=block_m,
        block_n=block_n,
        block_t=min(block_n, MASKED_KEYS),
        splits=splits,
        warps=8 if block_m >= MAX_TILE else 4,
        stages=2,
    )


def _power(n: int) -> int:
    """The least power of two >= n."""
    return 1 << (n - 1).bit_length()
