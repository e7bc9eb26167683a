"""What is launched: tile sizes and the number of programs, from numbers the host knows. Standard library only.

Both the launchers (compiled on first use) and `cubin` (compiled ahead of time) ask here, so that what is carried
inside an engine is what was measured from Python. Tile sizes are the usual ones for these GPUs' shared memory; they
were chosen by counting bytes, not by measurement.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

DTYPE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
CACHE_KINDS = {"int8": "i8", "fp8": "fp8e4nv"}
"""type of a cache of codes (`attention_op.CACHE_CODES`) -> as a kernel's argument is declared"""
FP8_CAPABILITY = 89  # from which on a GPU converts fp8
LEAST_KEYS = 256  # of a decode program's share: fewer, and the partial results cost more than they hide
APPEND_STEPS = 16
COMBINE_PARTS, MOST_PARTS = 16, 128  # partial results that combine adds up, and looks through, at a time
SEQUENCES = 64  # whose lengths decode adds up at a time
LEAST_ROWS, LONG_ROWS = 16, 128  # of a tile
BLOCKS_PER_SM = 2
FP_FUSION = True  # a * b + c in one rounding, but for combine; said always, because Triton 3.10 changes its default

# Shared memory one block may use, KiB. Source: CUDA C++ Programming Guide, compute capabilities; of 11.0 (Thor),
# libcudacxx's cuda/__device/arch_traits.h, where it has that of 10.0.
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
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
        if keys == 128 and (width > 128 or (long and (capability != 90 or width < 128))):
            continue  # the scores beside the accumulator would not fit in registers: `ptxas -v` shows what spills
        if keys == 64 and long and (wide or (in_registers and width > 128)):
            continue
        weights_bytes = tile_rows * keys * size if wide else 0  # they change registers through shared memory there
        if keys * width * size * (stages - held) + weights_bytes <= budget:
            return Tiles(tile_rows, keys, 8 if long else 4, stages)
    return Tiles(tile_rows, 16, 4, 1)


def works_ahead(tiles: Tiles, head: int, value_head: int, dtype: str, capability: int, cache: str = "") -> bool:
    """Whether prefill works out the next tile's products beside this tile's softmax: where products run on their own
    beside the threads (wgmma) and both tiles' scores fit in registers: `ptxas -v` shows what spills (fp8 codes do)."""
    return (cache != "fp8" and capability == 90 and tiles.rows == LONG_ROWS and DTYPE_BYTES[dtype] == 2
            and block(head) == block(value_head) and block(head) in (64, 128))


def choose_programs(sequences: int, kv_heads: int, row_tiles: int, keys: int, sm_count: int) -> int:
    """How many programs share the tiles of the whole batch: enough to fill the SMs, and none that could never get
    LEAST_KEYS.

    keys: host-known bound on the positions a row tile visits.
    """
    works = sequences * kv_heads * row_tiles
    return max(1, min(sm_count * BLOCKS_PER_SM, works * max(1, keys // LEAST_KEYS)))


@dataclass(frozen=True)
class Plan:
    """One launch of exact attention; those of long prompts are in `long_launch`.

    programs: of decode. ahead: of prefill, whether it works ahead.
    """

    kind: Literal["prefill", "decode"]
    tiles: Tiles
    programs: int = 1
    ahead: bool = False


def plan(*, sequences: int, steps: int, heads: int, kv_heads: int, head: int, value_head: int, dtype: str,
         window: int, bound: int, sm_count: int, capability: int, cache: str = "") -> Plan:
    """The launch for a batch of `sequences` with `steps` new tokens each and at most `bound` positions in sight.

    A cache long enough to be shared out, and either one row tile a head, so that lengths alone decide who has how much
    to do, or too few row tiles to fill the SMs: equal shares (decode). Else one program per row tile (prefill).

    cache: of codes, a name of `CACHE_KINDS`.
    """
    rows = steps * (heads // kv_heads)
    tiles = choose_tiles(rows, head, value_head, dtype, capability)
    row_tiles = -(-rows // tiles.rows)
    keys = min(bound, window + steps - 1) if window else bound
    few = row_tiles == 1 or 2 * sequences * kv_heads * row_tiles <= sm_count * BLOCKS_PER_SM
    if keys < 2 * LEAST_KEYS or not few:
        return Plan("prefill", tiles, ahead=works_ahead(tiles, head, value_head, dtype, capability, cache))
    return Plan("decode", tiles, choose_programs(sequences, kv_heads, row_tiles, keys, sm_count))


def workspace_elements(sequences: int, steps: int, heads: int, kv_heads: int, value_head: int, tile_rows: int,
                       programs: int) -> tuple[int, int, int]:
    """Elements of (partial outputs, fp32; their log-sum-exp, fp32; where a row's begin and end, int64) that decode
    writes and combine reads."""
    rows = steps * (heads // kv_heads)
    meetings = programs + sequences * kv_heads * -(-rows // tile_rows)
    held = min(tile_rows, rows) * meetings
    return held * value_head, held, 2 * sequences * steps * heads
