"""What a layer launches for a long prompt, as numbers: tiles, grids, workspace. No GPU, torch, Triton or TensorRT.

Order of launches, after append: score, select, long_prefill. Letters as in `gqa_export.long_attention_op`; G = H / K.
A call of S new tokens touches at most N = (S + leaf - 2) // leaf + 1 leaves, wherever it begins; U is N times the tiles
of a leaf (tiles), or N (hyper). segments = ceil(C / leaf) - 1.

    tiles  score         (U * parts, K, B)                               parts = ceil(G * score_rows / score.tile_rows)
           select        (U, K, B)
           long_prefill  (U * ceil(tile * G / long_prefill.tile_rows), K, B)
    hyper  score         (ceil(C / score.tile_rows) + ceil(S * G / score.tile_rows), K, B)
           select        (segments + N * G, K, B)
           long_prefill  (U * ceil(leaf * G / long_prefill.tile_rows), K, B)

Workspace behind the rotated queries, each part aligned to 256 bytes: the selection, int32 (tiles: [B, K, U, blocks];
hyper: [B, K, C + G * S]); then masses, fp32 [B, K, U * parts, C // block] (tiles), or orders, int32 [B, K, levels * C +
N * G * leaf] with levels the bits of `segments` (hyper).
"""

from __future__ import annotations

from dataclasses import replace

from gqa_plugins.grouped_attention import plan

from gqa_export.long_attention_op import LongSetting

KERNELS = ("score", "select", "long_prefill")
VOTE_ROWS, VOTE_KEYS = 64, 64  # at most, of a program of `score`, method tiles
HASH_ROWS = 64  # keys or queries whose codes a program finds
SORT_ROWS = 64  # counted at a time
MASSES = 1024  # looked through at a time
HYPER_ROWS, HYPER_KEYS = 64, 64  # at most, of a tile of long_prefill: fewer ranks, fewer buckets
MOST_SORT_KEYS = 2**31  # a place and a position are compared as one number of 32 bits


def leaves_of(steps: int, leaf: int) -> int:
    """The most leaves that a call of S new tokens touches, wherever it begins."""
    return (steps + leaf - 2) // leaf + 1


def segments_of(capacity: int, leaf: int) -> int:
    """How many segments the keys of a cache are cut into."""
    return max(0, -(-capacity // leaf) - 1)


def units_of(setting: LongSetting, steps: int) -> int:
    """Tiles (or leaves) that a call touches at most."""
    return leaves_of(steps, setting.leaf) * (setting.leaf // unit_of(setting))


def unit_of(setting: LongSetting) -> int:
    """Positions of a unit: rows of one program of long_prefill lie in one of them."""
    return setting.tile if setting.method == "tiles" else setting.leaf


def vote_rows(setting: LongSetting, group: int) -> int:
    """Rows of a program of `score`, method tiles."""
    return min(VOTE_ROWS, plan.block(group * setting.score_rows))


def vote_parts(setting: LongSetting, group: int) -> int:
    """Programs that the voting rows of one tile take."""
    return -(-group * setting.score_rows // vote_rows(setting, group))


def rows_of(kernel: str, setting: LongSetting, group: int) -> int:
    """Rows of a tile of a kernel, as `Variant.rows` (long_prefill: what `plan.choose_tiles` is asked for)."""
    if kernel == "long_prefill":
        most = plan.LONG_ROWS if setting.method == "tiles" else HYPER_ROWS
        return min(most, unit_of(setting) * group)
    if kernel == "select":
        return 1 if setting.method == "tiles" else SORT_ROWS
    return vote_rows(setting, group) if setting.method == "tiles" else HASH_ROWS


def choose_tiles(setting: LongSetting, group: int, head: int, value_head: int, dtype: str,
                 capability: int) -> plan.Tiles:
    """Tiles of long_prefill. With method hyper no more than 64 keys: which of them a row sees differs from row to row,
    and that takes registers (`ptxas -v`)."""
    tiles = plan.choose_tiles(rows_of("long_prefill", setting, group), head, value_head, dtype, capability)
    return tiles if setting.method == "tiles" else replace(tiles, keys=min(tiles.keys, HYPER_KEYS))


def grids(setting: LongSetting, *, batch: int, steps: int, capacity: int, kv_heads: int, group: int, score_rows: int,
          prefill_rows: int) -> dict[str, tuple[int, int, int]]:
    """Grid of each kernel. score_rows, prefill_rows: tile_rows of the compiled files."""
    units, rest = units_of(setting, steps), (kv_heads, batch)
    if setting.method == "tiles":
        score, select = units * -(-group * setting.score_rows // score_rows), units
    else:
        score = -(-capacity // score_rows) + -(-steps * group // score_rows)
        select = segments_of(capacity, setting.leaf) + leaves_of(steps, setting.leaf) * group
    row_tiles = units * -(-unit_of(setting) * group // prefill_rows)
    return {"score": (score, *rest), "select": (select, *rest), "long_prefill": (row_tiles, *rest)}


def scratch_elements(setting: LongSetting, *, batch: int, steps: int, capacity: int, kv_heads: int,
                     group: int) -> tuple[int, int]:
    """Elements of the selection (int32), and of masses (fp32) or orders (int32)."""
    heads, units = batch * kv_heads, units_of(setting, steps)
    if setting.method == "tiles":
        return (heads * units * (setting.heavy_keys // setting.block),
                heads * units * vote_parts(setting, group) * (capacity // setting.block))
    levels = segments_of(capacity, setting.leaf).bit_length()
    return (heads * (capacity + steps * group),
            heads * (levels * capacity + leaves_of(steps, setting.leaf) * group * setting.leaf))


def compiled_in(setting: LongSetting, projections: int, group: int) -> dict[str, int]:
    """What the kernels' constants must be; those that a kernel lacks are not its own."""
    of_tiles = {"TILE": setting.tile, "BLOCK": setting.block, "CHOSEN": setting.heavy_keys // setting.block,
                "SCORE_ROWS": setting.score_rows, "PARTS": vote_parts(setting, group)}
    of_hyper = {"HEAVY": setting.heavy_keys, "PROJECTIONS": projections, "BINS": 1 << projections}
    return {"LEAF": setting.leaf, "SAMPLES": setting.samples, "ANCHORS": setting.anchors,
            **(of_tiles if setting.method == "tiles" else of_hyper)}


def problem(setting: LongSetting, capacity: int, projections: int) -> str:
    """Why no launch holds this setting; "" if one does."""
    wrong = setting.problems(capacity)
    if not wrong and setting.method == "hyper" and capacity << projections >= MOST_SORT_KEYS:
        wrong = [f"capacity {capacity} times 2^{projections} codes exceeds {MOST_SORT_KEYS}"]
    return wrong[0] if wrong else ""
