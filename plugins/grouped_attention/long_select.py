"""What a long prompt's rows read: the kernels `score` and `select` of each method.

tiles: `score` adds up what the voting rows of a tile put on each block of keys before the leaf; `select` takes the
blocks of most mass, those with anchors first, ties by the lower number. hyper: `score` finds the place of the code of
every key and query; `select` sorts the keys of each segment and the rows of each leaf by their places, equal places by
their index: a counting sort, so nothing depends on how threads run. Dimensions as in `gqa_export.long_attention_op`;
tiles' selection [B, K, units * blocks] and hyper's [B, K, C + G * S] are laid out as the op's own output (int32 here).
"""

from __future__ import annotations

import triton
import triton.language as tl
from gqa_plugins.grouped_attention.long_rows import bits_of, level_of, unit_rows, whole_lengths
from gqa_plugins.grouped_attention.primitives import load_cache, load_rows, scores_base2

SCORE_ARGUMENTS = {
    "tiles": (("query_ptr", "*T"), ("key_ptr", "*T"), ("past_lengths_ptr", "*i32"), ("new_lengths_ptr", "*i32"),
              ("masses_ptr", "*fp32"), ("kv_heads", "i32"), ("steps", "i32"), ("capacity", "i32"), ("scale", "fp32"),
              ("softcap", "fp32")),
    "hyper": (("query_ptr", "*T"), ("key_ptr", "*T"), ("past_lengths_ptr", "*i32"), ("new_lengths_ptr", "*i32"),
              ("projections_ptr", "*fp32"), ("code_order_ptr", "*i32"), ("selection_ptr", "*i32"), ("kv_heads", "i32"),
              ("steps", "i32"), ("capacity", "i32")),
}
SELECT_ARGUMENTS = {
    "tiles": (("past_lengths_ptr", "*i32"), ("new_lengths_ptr", "*i32"), ("masses_ptr", "*fp32"),
              ("selection_ptr", "*i32"), ("kv_heads", "i32"), ("steps", "i32"), ("capacity", "i32")),
    "hyper": (("past_lengths_ptr", "*i32"), ("new_lengths_ptr", "*i32"), ("selection_ptr", "*i32"),
              ("order_ptr", "*i32"), ("kv_heads", "i32"), ("steps", "i32"), ("capacity", "i32")),
}


@triton.jit(do_not_specialize=["kv_heads", "steps", "capacity"])
def score_tiles_kernel(query_ptr, key_ptr, past_lengths_ptr, new_lengths_ptr, masses_ptr, kv_heads, steps, capacity,
                       scale, softcap,
                       GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                       BLOCK_KEYS: tl.constexpr, LEAF: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
                       SCORE_ROWS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Grid (units * parts, K, B). masses [B, K, units * parts, C // block] fp32: sums of voting rows' softmax.

    Two passes over the keys: a row's softmax needs its sum first.
    """
    sequence = tl.program_id(2).to(tl.int64)
    kv_head = tl.program_id(1)
    shares = (GROUP * SCORE_ROWS + BLOCK_ROWS - 1) // BLOCK_ROWS  # of the voting rows
    unit = tl.program_id(0) // shares
    past, new, _broken, _ = whole_lengths(past_lengths_ptr, new_lengths_ptr, sequence, steps, capacity)
    leaf, first, _count, valid = unit_rows(past, new, steps, unit, LEAF, TILE)
    prefix = tl.where(valid > 0, leaf * LEAF, 0)

    row = tl.program_id(0) % shares * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    votes = row < tl.where(valid > 0, GROUP * SCORE_ROWS, 0)
    step = first + tl.maximum((row // GROUP + 1) * valid // SCORE_ROWS - 1, 0)
    head_row = (sequence * steps + step) * (kv_heads * GROUP) + kv_head * GROUP + row % GROUP
    query = load_rows(query_ptr, head_row * HEAD, votes, HEAD, BLOCK_HEAD)
    key_base = key_ptr + (sequence * kv_heads + kv_head) * capacity * HEAD
    parts = (BLOCK + BLOCK_KEYS - 1) // BLOCK_KEYS  # of a block: 1, but for a very long one
    tiles = prefix // BLOCK * parts
    column = tl.arange(0, BLOCK_KEYS)

    top = tl.full([BLOCK_ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    for tile in range(0, tiles):
        inside = tile % parts * BLOCK_KEYS + column
        here = tl.where(inside < BLOCK, tile // parts * BLOCK + inside, prefix)
        key = load_cache(key_base, here, prefix, HEAD, BLOCK_HEAD, True)
        scores = scores_base2(query, key, scale, softcap, HAS_SOFTCAP, PRECISION, BLOCK_ROWS, BLOCK_KEYS)
        scores = tl.where((here < prefix)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(scores - new_top[:, None]), 1)
        top = new_top
    share = tl.where(votes, 1.0 / tl.where(total == 0, 1.0, total), 0.0)
    place = (sequence * kv_heads + kv_head) * tl.num_programs(0) + tl.program_id(0)
    masses_base = masses_ptr + place * (capacity // BLOCK)
    mass = 0.0
    for tile in range(0, tiles):
        inside = tile % parts * BLOCK_KEYS + column
        here = tl.where(inside < BLOCK, tile // parts * BLOCK + inside, prefix)
        key = load_cache(key_base, here, prefix, HEAD, BLOCK_HEAD, True)
        scores = scores_base2(query, key, scale, softcap, HAS_SOFTCAP, PRECISION, BLOCK_ROWS, BLOCK_KEYS)
        weights = tl.where((here < prefix)[None, :], tl.exp2(scores - top[:, None]) * share[:, None], 0.0)
        mass = tl.where(tile % parts == 0, 0.0, mass) + tl.sum(tl.sum(weights, 1), 0)
        tl.store(masses_base + tile // parts, mass, mask=tile % parts == parts - 1)


@triton.jit(do_not_specialize=["kv_heads", "steps", "capacity"])
def select_tiles_kernel(past_lengths_ptr, new_lengths_ptr, masses_ptr, selection_ptr, kv_heads, steps, capacity,
                        LEAF: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, CHOSEN: tl.constexpr,
                        ANCHORS: tl.constexpr, PARTS: tl.constexpr, BLOCK_MASSES: tl.constexpr):
    """Grid (units, K, B). The next block is the one of most mass after the last: the masses are read, never changed."""
    sequence = tl.program_id(2).to(tl.int64)
    kv_head = tl.program_id(1)
    unit = tl.program_id(0)
    past, new, _broken, _ = whole_lengths(past_lengths_ptr, new_lengths_ptr, sequence, steps, capacity)
    leaf, _first, _count, valid = unit_rows(past, new, steps, unit, LEAF, TILE)
    blocks = tl.where(valid > 0, leaf * (LEAF // BLOCK), 0)
    place = (sequence * kv_heads + kv_head) * tl.num_programs(0) + unit
    masses_base = masses_ptr + place * PARTS * (capacity // BLOCK)
    selection_base = selection_ptr + place * CHOSEN
    forced = (ANCHORS + BLOCK - 1) // BLOCK
    lane = tl.arange(0, BLOCK_MASSES)
    before, number = float("inf"), -1
    for chosen in range(0, CHOSEN):
        most = tl.full([BLOCK_MASSES], float("-inf"), dtype=tl.float32)
        where = tl.full([BLOCK_MASSES], 2147483647, dtype=tl.int32)
        for start in range(0, blocks, BLOCK_MASSES):
            index = start + lane
            mass = tl.zeros([BLOCK_MASSES], dtype=tl.float32)
            for part in range(0, PARTS):
                mass += tl.load(masses_base + part * (capacity // BLOCK) + index, mask=index < blocks, other=0.0)
            after = (mass < before) | ((mass == before) & (index > number))
            better = (index < blocks) & (index >= forced) & after & (mass > most)
            most = tl.where(better, mass, most)
            where = tl.where(better, index, where)
        best = tl.max(most, 0)
        at = tl.min(tl.where(most == best, where, 2147483647), 0)
        by_anchor = chosen < forced
        before = tl.where(by_anchor, before, best)
        number = tl.where(by_anchor, number, at)
        found = tl.where(by_anchor, chosen, at)
        tl.store(selection_base + chosen, tl.where(found < blocks, found, -1))


@triton.jit
def places(x, projections_ptr, code_order_ptr, HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr,
           PROJECTIONS: tl.constexpr):
    """Places of the codes of vectors [rows, BLOCK_HEAD] in the order of codes, [rows]."""
    column = tl.arange(0, BLOCK_HEAD)
    code = tl.zeros([x.shape[0]], dtype=tl.int32)
    for bit in tl.static_range(PROJECTIONS):
        direction = tl.load(projections_ptr + column * PROJECTIONS + bit, mask=column < HEAD, other=0.0)
        code += tl.where(tl.sum(x.to(tl.float32) * direction[None, :], 1) > 0, 1 << bit, 0)
    return tl.load(code_order_ptr + code)


@triton.jit(do_not_specialize=["kv_heads", "steps", "capacity"])
def score_hyper_kernel(query_ptr, key_ptr, past_lengths_ptr, new_lengths_ptr, projections_ptr, code_order_ptr,
                       selection_ptr, kv_heads, steps, capacity,
                       GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                       PROJECTIONS: tl.constexpr):
    """Grid (tiles of keys, then tiles of query rows; K, B)."""
    sequence = tl.program_id(2).to(tl.int64)
    kv_head = tl.program_id(1)
    past, new, _broken, _ = whole_lengths(past_lengths_ptr, new_lengths_ptr, sequence, steps, capacity)
    key_tiles = tl.cdiv(capacity, BLOCK_ROWS)
    selection_base = selection_ptr + (sequence * kv_heads + kv_head) * (capacity + steps * GROUP).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if tl.program_id(0) < key_tiles:
        if tl.program_id(0) * BLOCK_ROWS < past + new:
            key = load_cache(key_ptr + (sequence * kv_heads + kv_head) * capacity * HEAD, row, past + new, HEAD,
                             BLOCK_HEAD, True)
            found = places(key, projections_ptr, code_order_ptr, HEAD, BLOCK_HEAD, PROJECTIONS)
            tl.store(selection_base + row, found, mask=row < past + new)
    else:
        row -= key_tiles * BLOCK_ROWS
        step, member = row // GROUP, row % GROUP
        head_row = (sequence * steps + step) * (kv_heads * GROUP) + kv_head * GROUP + member
        query = load_rows(query_ptr, head_row * HEAD, step < new, HEAD, BLOCK_HEAD)
        found = places(query, projections_ptr, code_order_ptr, HEAD, BLOCK_HEAD, PROJECTIONS)
        tl.store(selection_base + capacity + member * steps + step, found, mask=step < new)


@triton.jit(do_not_specialize=["kv_heads", "steps", "capacity"])
def select_hyper_kernel(past_lengths_ptr, new_lengths_ptr, selection_ptr, order_ptr, kv_heads, steps, capacity,
                        GROUP: tl.constexpr, LEAF: tl.constexpr, BINS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Grid (segments, then leaves of the call times heads of the group; K, B).

    Every number e of a leaf but 0 ends one segment: the lowest set bit of e is its leaves.
    """
    sequence = tl.program_id(2).to(tl.int64)
    head = sequence * kv_heads + tl.program_id(1)
    past, new, _broken, _ = whole_lengths(past_lengths_ptr, new_lengths_ptr, sequence, steps, capacity)
    segments = tl.cdiv(capacity, LEAF) - 1
    levels = bits_of(segments)
    leaves = (steps + LEAF - 2) // LEAF + 1
    source = selection_ptr + head * (capacity + steps * GROUP).to(tl.int64)
    target = order_ptr + head * (levels.to(tl.int64) * capacity + leaves * (GROUP * LEAF))
    if tl.program_id(0) < segments:
        end = tl.program_id(0) + 1
        width = end & -end
        low = (end - width) * LEAF
        # Read by rows of the leaves end .. end + width - 1, if the call has any.
        wanted = (past + new > end * LEAF) & (past < (end + width) * LEAF)
        count = tl.where(wanted, width * LEAF, 0)
        source += low
        target += level_of(width).to(tl.int64) * capacity + low
    else:
        number = tl.program_id(0) - segments
        _leaf, first, _count, count = unit_rows(past, new, steps, number // GROUP, LEAF, LEAF)
        low = 0
        source += capacity + number % GROUP * steps + first
        target += levels.to(tl.int64) * capacity + number * LEAF
    bins = tl.arange(0, BINS)
    row = tl.arange(0, BLOCK_ROWS)
    counts = tl.zeros([BINS], dtype=tl.int32)
    for start in range(0, count, BLOCK_ROWS):
        place = tl.load(source + start + row, mask=start + row < count, other=BINS)
        counts += tl.sum((place[:, None] == bins[None, :]).to(tl.int32), 0)
    following = tl.cumsum(counts, 0) - counts
    for start in range(0, count, BLOCK_ROWS):
        place = tl.load(source + start + row, mask=start + row < count, other=BINS)
        mine = (place[:, None] == bins[None, :]).to(tl.int32)
        rank = tl.sum(mine * (following[None, :] + tl.cumsum(mine, 0) - mine), 1)
        tl.store(target + rank, low + start + row, mask=(start + row < count) & (place < BINS))
        following += tl.sum(mine, 0)
