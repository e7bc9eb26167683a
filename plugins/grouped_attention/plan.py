"""What is launched: tile sizes and the number of splits, from numbers the host knows. Standard library only.

Both the launchers (compiled on first use) and `cubin` (compiled ahead of time) ask here, so that what is carried
inside an engine is what was measured from Python. Tile sizes are the usual ones for these GPUs' shared memory; they
were chosen by counting bytes, not by measurement.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

DTYPE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
MAX_SPLITS = 128
MIN_KEYS_PER_SPLIT = 256  # fewer, and writing and reading the partial results costs more than it hides
APPEND_STEPS = 16
COMBINE_SPLITS = 16
LONG_ROWS = 128
BLOCKS_PER_SM = 2
FP_FUSION = True  # a * b + c in one rounding, but for combine; said always, because Triton 3.10 changes its default

# Shared memory one block may use, KiB. Source: CUDA C++ Programming Guide, compute capabilities.
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
CAPABILITIES = tuple(SHARED_KIB)


@dataclass(frozen=True)
class Tiles:
    """One program's work: query rows (tokens times group) against keys, and how it is compiled."""

    rows: int
    keys: int
    warps: int
    stages: int


def interpreting() -> bool:
    """Whether Triton interprets kernels in this process, by its variable: its Python switch moved between versions."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def block(size: int) -> int:
    """Head size as the kernels tile it: a power of two, at least 16 (the least depth of a tensor-core product)."""
    return max(16, 1 << (size - 1).bit_length())


def row_block(rows: int) -> int:
    """Rows of a tile for `rows` = S * (H / K) rows in all: 16, 32, 64 or 128."""
    return min(LONG_ROWS, block(rows))


def choose_tiles(rows: int, head: int, value_head: int, dtype: str, capability: int = 80) -> Tiles:
    """Tiles for an attention kernel over `rows` rows, within the capability's shared memory.

    Short tiles (decode) are bound by bytes: narrow products, deep prefetch, two blocks on an SM. Long ones (prefill)
    are bound by products. fp32 is multiplied outside the tensor cores, exactly, so its tiles are small.
    """
    shared_bytes = SHARED_KIB.get(capability, 99) * 1024
    size, width = DTYPE_BYTES[dtype], block(head) + block(value_head)
    tile_rows = row_block(rows)
    if size == 4:
        narrow = width <= 128  # with wider heads, 32 keys do not fit in registers and spill (ptxas -v)
        return Tiles(min(tile_rows, 32), 32 if narrow else 16, 4, 2 if width <= 256 else 1)
    wide = width > 256
    if wide and shared_bytes < 128 * 1024:
        tile_rows = min(tile_rows, 64)
    long = tile_rows == LONG_ROWS
    budget = shared_bytes // (1 if long else BLOCKS_PER_SM) - 2048 - tile_rows * block(head) * size
    # Warpgroup and tensor-memory products read the tile from shared memory, so a pipeline of n stages holds n tiles;
    # elsewhere it goes to registers first, and n - 1 are held. Seen in the compiled kernels' shared memory.
    in_registers = not 90 <= capability < 120
    held = 0 if tile_rows >= 64 and not in_registers else 1
    for keys, stages in ((128, 3), (64, 4), (64, 3), (32, 4), (32, 3), (32, 2), (16, 3), (16, 2)):
        if keys == 128 and (long or width > 128):
            continue  # the scores beside the accumulator would not fit in registers: `ptxas -v` shows what spills
        if keys == 64 and long and (wide or (in_registers and width > 128)):
            continue
        weights_bytes = tile_rows * keys * size if wide else 0  # they change registers through shared memory there
        if keys * width * size * (stages - held) + weights_bytes <= budget:
            return Tiles(tile_rows, keys, 8 if long else 4, stages)
    return Tiles(tile_rows, 16, 4, 1)


def choose_splits(sequences: int, kv_heads: int, row_tiles: int, keys: int, sm_count: int) -> int:
    """How many programs share one (sequence, key/value head, row tile).

    keys: host-known bound on the positions a row tile visits. Enough to fill the SMs, as few as possible; a last
    wave counts as a full one: the least count whose filling is within 95 % of the best.
    """
    work = sequences * kv_heads * row_tiles
    slots = max(1, sm_count * BLOCKS_PER_SM)
    most = min(MAX_SPLITS, max(1, keys // MIN_KEYS_PER_SPLIT), -(-slots // max(1, work)))
    filling = [work * n / slots / -(-work * n // slots) for n in range(1, most + 1)]
    return next(n for n, share in enumerate(filling, 1) if share >= 0.95 * max(filling))


@dataclass(frozen=True)
class Plan:
    """One launch of attention. `kind`: a later approximate kernel for very long contexts would be a third one."""

    kind: Literal["prefill", "decode"]
    tiles: Tiles
    splits: int = 1


def plan(*, sequences: int, steps: int, heads: int, kv_heads: int, head: int, value_head: int, dtype: str,
         window: int, bound: int, sm_count: int, capability: int) -> Plan:
    """The launch for a batch of `sequences` with `steps` new tokens each and at most `bound` positions in sight.

    Few rows and a long cache: split over the cache (decode), else one program per row tile (prefill).
    """
    rows = steps * (heads // kv_heads)
    tiles = choose_tiles(rows, head, value_head, dtype, capability)
    keys = min(bound, window + steps - 1) if window else bound
    splits = choose_splits(sequences, kv_heads, -(-rows // tiles.rows), keys, sm_count)
    return Plan("decode" if splits > 1 else "prefill", tiles, splits)


def workspace_elements(sequences: int, steps: int, heads: int, value_head: int, splits: int) -> tuple[int, int]:
    """fp32 elements of (partial outputs, their log-sum-exp) that decode writes and combine reads."""
    rows = sequences * steps * heads * splits
    return rows * value_head, rows
