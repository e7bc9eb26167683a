"""Attention of a long prompt, in one online softmax: the own leaf, and of the keys before it those that were selected.

Runs after `append`, `score` and `select`. Dimensions as in `gqa_export.long_attention_op`. Grid: (row tiles, K, B), a
row tile being a part of a unit's rows times the heads of a group; the last rows first, since they see most. With method
hyper a tile holds rows whose ranks in their leaf follow one another, so that they share buckets, and it reads all
buckets that one of them has: ranks / leaf of every segment and a bucket. Loops over samples and anchors, of a few
tiles, are not pipelined: that would be more code and registers than they are worth.
Source: Han et al., 2023 (arXiv:2310.05869).
"""

from __future__ import annotations

import triton
import triton.language as tl
from gqa_plugins.grouped_attention.long_rows import attend_named, bits_of, level_of, sampled, unit_rows, whole_lengths
from gqa_plugins.grouped_attention.primitives import LOG2E, attend, load_rows, store_rows

_FIRST = (("query_ptr", "*T"), ("key_ptr", "*T"), ("value_ptr", "*T"), ("past_lengths_ptr", "*i32"),
          ("new_lengths_ptr", "*i32"), ("sinks_ptr", "*T"), ("fractions_ptr", "*i32"), ("selection_ptr", "*i32"))
_LAST = (("output_ptr", "*T"), ("kv_heads", "i32"), ("steps", "i32"), ("capacity", "i32"), ("scale", "fp32"),
         ("softcap", "fp32"))
ARGUMENTS = {"tiles": (*_FIRST, *_LAST), "hyper": (*_FIRST, ("order_ptr", "*i32"), *_LAST)}


@triton.jit(do_not_specialize=["kv_heads", "steps", "capacity"])
def long_tiles_kernel(query_ptr, key_ptr, value_ptr, past_lengths_ptr, new_lengths_ptr, sinks_ptr, fractions_ptr,
                      selection_ptr, output_ptr, kv_heads, steps, capacity, scale, softcap,
                      GROUP: tl.constexpr, HEAD: tl.constexpr, VALUE_HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr,
                      BLOCK_VALUE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
                      LEAF: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, CHOSEN: tl.constexpr,
                      SAMPLES: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
                      PRECISION: tl.constexpr):
    """Method tiles: all rows of a program have chosen the same blocks."""
    sequence = tl.program_id(2).to(tl.int64)
    kv_head = tl.program_id(1)
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    parts = (TILE * GROUP + BLOCK_ROWS - 1) // BLOCK_ROWS
    unit, first_row = number // parts, number % parts * BLOCK_ROWS
    past, new, broken, rows_new = whole_lengths(past_lengths_ptr, new_lengths_ptr, sequence, steps, capacity)
    leaf, first, count, valid_steps = unit_rows(past, new, steps, unit, LEAF, TILE)
    index = (first_row + tl.arange(0, BLOCK_ROWS)) // GROUP
    member = (first_row + tl.arange(0, BLOCK_ROWS)) % GROUP
    step, valid = first + index, index < valid_steps
    head_row = (sequence * steps + step) * (kv_heads * GROUP) + kv_head * GROUP + member
    query = load_rows(query_ptr, head_row * HEAD, valid, HEAD, BLOCK_HEAD)
    some = first_row // GROUP < valid_steps
    start = leaf * LEAF
    prefix = tl.where(some, start, 0)
    last = tl.minimum((first_row + BLOCK_ROWS - 1) // GROUP, valid_steps - 1)
    stop = tl.where(some, past + first + last + 1, start)

    acc, top, total = empty_rows(sinks_ptr, kv_head * GROUP + member, HAS_SINKS, BLOCK_ROWS, BLOCK_VALUE)
    cache_head = (sequence * kv_heads + kv_head) * capacity
    key_base, value_base = key_ptr + cache_head * HEAD, value_ptr + cache_head * VALUE_HEAD
    acc, top, total = attend(acc, top, total, query, key_base, value_base, past + step, start, stop, stop, stop, 0,
                             scale, softcap, HEAD, VALUE_HEAD, BLOCK_HEAD, BLOCK_VALUE, BLOCK_ROWS, BLOCK_KEYS, False,
                             HAS_SOFTCAP, PRECISION, True)
    units = tl.num_programs(0) // parts
    chosen_base = selection_ptr + ((sequence * kv_heads + kv_head) * units + unit) * CHOSEN
    column = tl.arange(0, BLOCK_KEYS)
    every_row = tl.full([BLOCK_ROWS, BLOCK_KEYS], True, dtype=tl.int1)
    heavy = tl.where(prefix > 0, CHOSEN * BLOCK, 0)
    for from_key in range(0, heavy, BLOCK_KEYS):
        place = from_key + column
        block = tl.load(chosen_base + place // BLOCK, mask=place < heavy, other=-1)
        positions = block * BLOCK + place % BLOCK
        present = (block >= 0) & (positions < prefix)
        acc, top, total = attend_named(acc, top, total, query, key_base, value_base, positions, present, every_row,
                                       0.0, prefix, scale, softcap, HEAD, VALUE_HEAD, BLOCK_HEAD, BLOCK_VALUE,
                                       BLOCK_ROWS, BLOCK_KEYS, HAS_SOFTCAP, PRECISION)
    for tile in tl.range(0, tl.cdiv(tl.minimum(prefix, SAMPLES), BLOCK_KEYS), num_stages=1):
        positions, present, weight = sampled(fractions_ptr, kv_head, tile, prefix, SAMPLES, BLOCK_KEYS)
        for one in range(0, CHOSEN):
            present = present & (positions // BLOCK != tl.load(chosen_base + one))
        acc, top, total = attend_named(acc, top, total, query, key_base, value_base, positions, present, every_row,
                                       weight, prefix, scale, softcap, HEAD, VALUE_HEAD, BLOCK_HEAD, BLOCK_VALUE,
                                       BLOCK_ROWS, BLOCK_KEYS, HAS_SOFTCAP, PRECISION)
    write_rows(output_ptr, head_row, acc, total, broken, step < rows_new, index < count, VALUE_HEAD, BLOCK_VALUE)


@triton.jit(do_not_specialize=["kv_heads", "steps", "capacity"])
def long_hyper_kernel(query_ptr, key_ptr, value_ptr, past_lengths_ptr, new_lengths_ptr, sinks_ptr, fractions_ptr,
                      selection_ptr, order_ptr, output_ptr, kv_heads, steps, capacity, scale, softcap,
                      GROUP: tl.constexpr, HEAD: tl.constexpr, VALUE_HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr,
                      BLOCK_VALUE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
                      LEAF: tl.constexpr, HEAVY: tl.constexpr, SAMPLES: tl.constexpr, ANCHORS: tl.constexpr,
                      HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, PRECISION: tl.constexpr):
    """Method hyper: row r of a leaf is the one of rank r // GROUP among those of head r % GROUP."""
    sequence = tl.program_id(2).to(tl.int64)
    kv_head = tl.program_id(1)
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    parts = (LEAF * GROUP + BLOCK_ROWS - 1) // BLOCK_ROWS
    unit, first_row = number // parts, number % parts * BLOCK_ROWS
    past, new, broken, rows_new = whole_lengths(past_lengths_ptr, new_lengths_ptr, sequence, steps, capacity)
    leaf, first, count, valid_steps = unit_rows(past, new, steps, unit, LEAF, LEAF)
    rank = (first_row + tl.arange(0, BLOCK_ROWS)) // GROUP
    member = (first_row + tl.arange(0, BLOCK_ROWS)) % GROUP
    valid = rank < valid_steps
    segments = tl.cdiv(capacity, LEAF) - 1
    levels = bits_of(segments)
    leaves = tl.num_programs(0) // parts
    head = sequence * kv_heads + kv_head
    order_base = order_ptr + head * (levels.to(tl.int64) * capacity + leaves * (GROUP * LEAF))
    rows_base = order_base + levels.to(tl.int64) * capacity
    # Rows that are no token keep their place: they are behind those that are.
    step = first + tl.load(rows_base + (unit * GROUP + member) * LEAF + rank, mask=valid, other=0)
    step = tl.where(valid, step, first + rank)
    head_row = (sequence * steps + step) * (kv_heads * GROUP) + kv_head * GROUP + member
    query = load_rows(query_ptr, head_row * HEAD, valid, HEAD, BLOCK_HEAD)
    some = first_row // GROUP < valid_steps
    start = leaf * LEAF
    limit = past + new
    stop = tl.where(some, past + first + valid_steps, start)

    acc, top, total = empty_rows(sinks_ptr, kv_head * GROUP + member, HAS_SINKS, BLOCK_ROWS, BLOCK_VALUE)
    key_base, value_base = key_ptr + head * capacity * HEAD, value_ptr + head * capacity * VALUE_HEAD
    acc, top, total = attend(acc, top, total, query, key_base, value_base, past + step, start, stop, stop, stop, 0,
                             scale, softcap, HEAD, VALUE_HEAD, BLOCK_HEAD, BLOCK_VALUE, BLOCK_ROWS, BLOCK_KEYS, False,
                             HAS_SOFTCAP, PRECISION, True)
    places_base = selection_ptr + head * (capacity + steps * GROUP).to(tl.int64)
    first_rank = first_row // GROUP
    last_rank = tl.minimum((first_row + BLOCK_ROWS - 1) // GROUP, valid_steps - 1)
    ranked = tl.maximum(valid_steps, 1).to(tl.int64)
    column = tl.arange(0, BLOCK_KEYS)
    every_row = tl.full([BLOCK_ROWS, BLOCK_KEYS], True, dtype=tl.int1)
    rest = tl.where(some, leaf, 0)
    while rest > 0:
        lowest = rest & -rest
        rest -= lowest
        width, low = lowest * LEAF, rest * LEAF
        buckets = tl.maximum(width // HEAVY, 1)
        size = width // buckets
        bucket = (tl.minimum(rank, valid_steps - 1) * buckets.to(tl.int64) // ranked).to(tl.int32)
        segment = order_base + level_of(lowest).to(tl.int64) * capacity + low
        hidden = tl.where(low == 0, ANCHORS, 0)  # keys below it are read as anchors
        from_key = (first_rank * buckets.to(tl.int64) // ranked).to(tl.int32) * size
        to_key = ((last_rank * buckets.to(tl.int64) // ranked).to(tl.int32) + 1) * size
        for at in range(from_key, to_key, BLOCK_KEYS):
            place = at + column
            present = place < to_key
            positions = tl.load(segment + place, mask=present, other=0)
            mine = (place // size)[None, :] == bucket[:, None]
            acc, top, total = attend_named(acc, top, total, query, key_base, value_base, positions,
                                           present & (positions >= hidden), mine, 0.0, limit, scale, softcap, HEAD,
                                           VALUE_HEAD, BLOCK_HEAD, BLOCK_VALUE, BLOCK_ROWS, BLOCK_KEYS, HAS_SOFTCAP,
                                           PRECISION)
        # A key is in a row's bucket if its (place, position) is within those of the bucket's first and last key.
        first_key = tl.load(segment + bucket * size)
        last_key = tl.load(segment + bucket * size + size - 1)
        first_key += tl.load(places_base + first_key) * capacity
        last_key += tl.load(places_base + last_key) * capacity
        for tile in tl.range(0, tl.cdiv(tl.minimum(width, SAMPLES), BLOCK_KEYS), num_stages=1):
            index, present, weight = sampled(fractions_ptr, kv_head, tile, width, SAMPLES, BLOCK_KEYS)
            positions = low + index
            sort_key = tl.load(places_base + positions, mask=present, other=0) * capacity + positions
            known = (sort_key[None, :] >= first_key[:, None]) & (sort_key[None, :] <= last_key[:, None])
            acc, top, total = attend_named(acc, top, total, query, key_base, value_base, positions,
                                           present & (positions >= hidden), known == 0, weight, limit, scale, softcap,
                                           HEAD, VALUE_HEAD, BLOCK_HEAD, BLOCK_VALUE, BLOCK_ROWS, BLOCK_KEYS,
                                           HAS_SOFTCAP, PRECISION)
    anchors = tl.where(some & (leaf > 0), ANCHORS, 0)
    for at in tl.range(0, anchors, BLOCK_KEYS, num_stages=1):
        acc, top, total = attend_named(acc, top, total, query, key_base, value_base, at + column,
                                       at + column < anchors, every_row, 0.0, limit, scale, softcap, HEAD, VALUE_HEAD,
                                       BLOCK_HEAD, BLOCK_VALUE, BLOCK_ROWS, BLOCK_KEYS, HAS_SOFTCAP, PRECISION)
    write_rows(output_ptr, head_row, acc, total, broken, step < rows_new, rank < count, VALUE_HEAD, BLOCK_VALUE)


@triton.jit
def empty_rows(sinks_ptr, head, HAS_SINKS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_VALUE: tl.constexpr):
    """A softmax that has seen nothing but its sink."""
    acc = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], dtype=tl.float32)
    if HAS_SINKS:
        top = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    else:
        top = tl.full([BLOCK_ROWS], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    return acc, top, total


@triton.jit
def write_rows(output_ptr, head_row, acc, total, broken, token, inside, VALUE_HEAD: tl.constexpr,
               BLOCK_VALUE: tl.constexpr):
    """The rows' means; zero where a row is no token, NaN where its sequence's lengths are broken."""
    output = acc / tl.where(total == 0, 1.0, total)[:, None]
    output = tl.where(broken, float("nan"), output)
    output = tl.where(token[:, None], output, 0.0)
    store_rows(output_ptr, head_row * VALUE_HEAD, output, inside, VALUE_HEAD, BLOCK_VALUE)
