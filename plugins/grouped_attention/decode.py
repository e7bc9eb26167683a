"""Decode: attention with the whole batch's cache in equal shares among programs, then a combine of partial results.

Runs after `append`. Dimensions as in `gqa_export.attention_op`. The cache is counted in tiles of keys: those that a
sequence sees, times its key/value heads and row tiles (its works), one sequence after the other. Decode's grid is
(programs): a number that the host knows. On the device, from the lengths there, each program finds its share of all
tiles, a run of at most ceil(tiles / programs); it may begin and end within a work and hold several. So a long sequence
among short ones keeps every program busy, and a captured graph serves every length.

Workspace. A program meets a work at most once, and the later a program the later its works: program + work names their
meeting, of programs + works in all. partial [tile rows, meetings, E] (fp32), normalised, and its log-sum-exp in powers
of two [tile rows, meetings] (fp32), -inf where a row saw nothing (its partial is then never written nor read). ranges
[B, K, S * H/K, 2] (int64): a row's first and last element of the log-sum-exps, written by whoever works out its first
and its last tile. The result depends on the share's length, not on the number of programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from gqa_plugins.grouped_attention import plan
from gqa_plugins.grouped_attention.codes import Codes
from gqa_plugins.grouped_attention.plan import COMBINE_PARTS, FP_FUSION, MOST_PARTS, SEQUENCES, Tiles, block
from gqa_plugins.grouped_attention.primitives import (
    LOG2E,
    attend,
    first_fault,
    key_range,
    load_rows,
    narrow,
    sequence_lengths,
    store_rows,
)

ARGUMENTS = (
    ("query_ptr", "*T"), ("key_ptr", "*C"), ("value_ptr", "*C"), ("past_lengths_ptr", "*i32"),
    ("new_lengths_ptr", "*i32"), ("partial_ptr", "*fp32"), ("logsum_ptr", "*fp32"), ("ranges_ptr", "*i64"),
    ("sequences", "i32"), ("kv_heads", "i32"), ("steps", "i32"), ("capacity", "i32"), ("least_keys", "i32"),
    ("window", "i32"), ("scale", "fp32"), ("softcap", "fp32"),
)
CODED_ARGUMENTS = (("value_scale", "fp32"),)
"""what follows where the cache holds codes; of combine `append.FAULTS` where there are new keys"""
COMBINE_ARGUMENTS = (
    ("partial_ptr", "*fp32"), ("logsum_ptr", "*fp32"), ("ranges_ptr", "*i64"), ("past_lengths_ptr", "*i32"),
    ("new_lengths_ptr", "*i32"), ("sinks_ptr", "*T"), ("output_ptr", "*T"), ("kv_heads", "i32"), ("steps", "i32"),
    ("capacity", "i32"),
)
JOINED = ("group", "value_head", "sinks", "ring")  # what combine's constants follow from
COMBINE_WARPS, COMBINE_STAGES, COMBINE_FP_FUSION = 4, 1, False


@triton.jit
def sequence_tiles(past_lengths_ptr, new_lengths_ptr, sequence, steps, capacity, window, HAS_WINDOW: tl.constexpr,
                   BLOCK_KEYS: tl.constexpr, RING: tl.constexpr):
    """(past, new, low, high, tiles) of one sequence or of several: what its steps see, and in how many tiles (64 bits).

    None where nothing is new or the lengths are broken."""
    past, new, broken = sequence_lengths(past_lengths_ptr, new_lengths_ptr, sequence, steps, capacity, RING)
    low, high = key_range(past, new, broken, past * 0, steps - 1, window, HAS_WINDOW)
    return past, new, low, high, tl.cdiv(high - low, BLOCK_KEYS).to(tl.int64)


@triton.jit
def block_tiles(past_lengths_ptr, new_lengths_ptr, first, sequences, steps, capacity, window,
                HAS_WINDOW: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_SEQUENCES: tl.constexpr,
                RING: tl.constexpr):
    """Tiles of the sequences first .. first + BLOCK_SEQUENCES - 1; none of those past the last."""
    index = first + tl.arange(0, BLOCK_SEQUENCES)
    _, _, _, _, tiles = sequence_tiles(past_lengths_ptr, new_lengths_ptr, tl.minimum(index, sequences - 1), steps,
                                       capacity, window, HAS_WINDOW, BLOCK_KEYS, RING)
    return tl.where(index < sequences, tiles, 0)


@triton.jit
def count_tiles(past_lengths_ptr, new_lengths_ptr, sequences, steps, capacity, window, HAS_WINDOW: tl.constexpr,
                BLOCK_KEYS: tl.constexpr, BLOCK_SEQUENCES: tl.constexpr, RING: tl.constexpr):
    """Tiles of all sequences, each counted for one work."""
    counted = tl.zeros([BLOCK_SEQUENCES], dtype=tl.int64)
    for first in range(0, sequences, BLOCK_SEQUENCES):
        counted += block_tiles(past_lengths_ptr, new_lengths_ptr, first, sequences, steps, capacity, window,
                               HAS_WINDOW, BLOCK_KEYS, BLOCK_SEQUENCES, RING)
    return tl.sum(counted, 0)


@triton.jit
def find_sequence(past_lengths_ptr, new_lengths_ptr, sequences, steps, capacity, window, works, tile,
                  HAS_WINDOW: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_SEQUENCES: tl.constexpr,
                  RING: tl.constexpr):
    """(sequence that holds this tile of the whole batch, tiles of those before it, counted for one work)."""
    sequence, before, counted = tile * 0, tile * 0, tile * 0
    for first in range(0, sequences, BLOCK_SEQUENCES):
        tiles = block_tiles(past_lengths_ptr, new_lengths_ptr, first, sequences, steps, capacity, window, HAS_WINDOW,
                            BLOCK_KEYS, BLOCK_SEQUENCES, RING)
        up_to = counted + tl.cumsum(tiles, 0)
        passed = up_to * works <= tile
        sequence += tl.sum(passed.to(tl.int64), 0)
        before += tl.sum(tl.where(passed, tiles, 0), 0)
        counted += tl.sum(tiles, 0)
    return sequence.to(tl.int32), before


@triton.jit(do_not_specialize=["sequences", "kv_heads", "steps", "capacity", "least_keys", "window"])
def decode_kernel(query_ptr, key_ptr, value_ptr, past_lengths_ptr, new_lengths_ptr, partial_ptr, logsum_ptr, ranges_ptr,
                  sequences, kv_heads, steps, capacity, least_keys, window, scale, softcap, value_scale,
                  GROUP: tl.constexpr, HEAD: tl.constexpr, VALUE_HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr,
                  BLOCK_VALUE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
                  BLOCK_SEQUENCES: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                  RING: tl.constexpr, PRECISION: tl.constexpr):
    """least_keys: a share is at least so long, because a shorter one costs more in partial results than it hides.
    RING: the capacity is slots, used again. value_scale: of a cache of codes, None of one of numbers (that of its keys
    is in scale)."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    row_tiles = tl.cdiv(steps * GROUP, BLOCK_ROWS)
    works = kv_heads * row_tiles  # of one sequence
    meetings = programs + sequences.to(tl.int64) * works
    room = capacity
    slots = None
    if RING:
        room = capacity - window + 1
        slots = capacity

    every = works * count_tiles(past_lengths_ptr, new_lengths_ptr, sequences, steps, room, window, HAS_WINDOW,
                                BLOCK_KEYS, BLOCK_SEQUENCES, RING)
    share = tl.maximum(tl.cdiv(every, programs), tl.cdiv(least_keys, BLOCK_KEYS))
    begin = program * share
    left = tl.minimum(share, every - begin).to(tl.int32)
    next_sequence, before = find_sequence(past_lengths_ptr, new_lengths_ptr, sequences, steps, room, window, works,
                                          begin, HAS_WINDOW, BLOCK_KEYS, BLOCK_SEQUENCES, RING)
    inside = begin - before * works  # of the sequence's tiles, those that are done
    while left > 0:
        past, new, low, high, tiles = sequence_tiles(past_lengths_ptr, new_lengths_ptr, next_sequence, steps, room,
                                                     window, HAS_WINDOW, BLOCK_KEYS, RING)
        while tiles * works <= inside:
            inside -= tiles * works
            next_sequence += 1
            past, new, low, high, tiles = sequence_tiles(past_lengths_ptr, new_lengths_ptr, next_sequence, steps,
                                                         room, window, HAS_WINDOW, BLOCK_KEYS, RING)
        work = (inside // tiles).to(tl.int32)
        from_tile = (inside - work * tiles).to(tl.int32)
        to_tile = tl.minimum(tiles.to(tl.int32), from_tile + left)
        inside += to_tile - from_tile
        left -= to_tile - from_tile
        sequence = next_sequence.to(tl.int64)

        kv_head = work // row_tiles
        first_row = work % row_tiles * BLOCK_ROWS
        row = tl.arange(0, BLOCK_ROWS)
        rows = first_row + row
        step = rows // GROUP
        valid = step < new
        head_row = (sequence * steps + step) * (kv_heads * GROUP) + kv_head * GROUP + rows % GROUP
        query = load_rows(query_ptr, head_row * HEAD, valid, HEAD, BLOCK_HEAD)
        # Of what the sequence sees, as far as this row tile sees.
        in_sight = past + tl.minimum((first_row + BLOCK_ROWS - 1) // GROUP + 1, new)
        start = low + from_tile * BLOCK_KEYS
        stop = tl.minimum(low + to_tile * BLOCK_KEYS, tl.minimum(high, in_sight))

        cache_head = (sequence * kv_heads + kv_head) * capacity
        acc = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], dtype=tl.float32)
        top = tl.full([BLOCK_ROWS], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
        # Masked throughout: a short tile's arithmetic hides behind its loads, and one loop has one prologue.
        acc, top, total = attend(acc, top, total, query, key_ptr + cache_head * HEAD,
                                 value_ptr + cache_head * VALUE_HEAD, past + step, start, stop, stop, stop, window,
                                 scale, softcap, HEAD, VALUE_HEAD, BLOCK_HEAD, BLOCK_VALUE, BLOCK_ROWS, BLOCK_KEYS,
                                 HAS_WINDOW, HAS_SOFTCAP, PRECISION, True, slots)

        # A row that sees anything has a weight of 1 at its top. Not `top`: on a GPU max drops a NaN, a sum keeps it.
        seen = total != 0.0
        logsum = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
        meeting = row * meetings + (program + sequence * works + work)
        tl.store(logsum_ptr + meeting, logsum, mask=valid)
        partial = acc / tl.where(seen, total, 1.0)[:, None]
        if value_scale is not None:
            partial = partial * value_scale
        store_rows(partial_ptr, meeting * VALUE_HEAD, partial, valid & seen, VALUE_HEAD, BLOCK_VALUE)
        range_ptr = ranges_ptr + ((sequence * kv_heads + kv_head) * (steps * GROUP) + rows) * 2
        tl.store(range_ptr, meeting, mask=step < tl.where(from_tile == 0, new, 0))
        tl.store(range_ptr + 1, meeting, mask=step < tl.where(to_tile == tiles, new, 0))


@triton.jit(do_not_specialize=["kv_heads", "steps", "capacity"])
def combine_kernel(partial_ptr, logsum_ptr, ranges_ptr, past_lengths_ptr, new_lengths_ptr, sinks_ptr, output_ptr,
                   kv_heads, steps, capacity, faults_ptr,
                   GROUP: tl.constexpr, VALUE_HEAD: tl.constexpr, BLOCK_VALUE: tl.constexpr,
                   BLOCK_PARTS: tl.constexpr, ALL_PARTS: tl.constexpr, HAS_SINKS: tl.constexpr,
                   RING: tl.constexpr):
    """One program per (sequence, step, query head), the rows of the output in order. RING: capacity is how many new
    tokens the ring takes. faults_ptr: as of `append`, None where no code is new.

    Compiled without fusion of a * b + c: in a sum over threads each would keep its own product unrounded and get its
    neighbour's rounded, so that threads that hold the same sum would hold different last bits of it.
    """
    head_row = tl.program_id(0).to(tl.int64)
    heads = kv_heads * GROUP
    head, token = (head_row % heads).to(tl.int32), head_row // heads
    sequence, step = token // steps, (token % steps).to(tl.int32)
    _, new, broken = sequence_lengths(past_lengths_ptr, new_lengths_ptr, sequence, steps, capacity, RING)
    written = (step < new) & (broken == 0)

    row = (sequence * kv_heads + head // GROUP) * (steps * GROUP) + step * GROUP + head % GROUP
    low = tl.load(ranges_ptr + row * 2, mask=written, other=0)
    parts = (tl.load(ranges_ptr + row * 2 + 1, mask=written, other=-1) - low + 1).to(tl.int32)
    top = float("-inf")
    for first in range(0, parts, ALL_PARTS):
        every = first + tl.arange(0, ALL_PARTS)
        logsums = tl.load(logsum_ptr + low + every, mask=every < parts, other=float("-inf"))
        top = tl.maximum(top, tl.max(logsums, 0))
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    reference = tl.where(top == float("-inf"), 0.0, top)

    columns = tl.arange(0, BLOCK_VALUE)
    acc = tl.zeros([BLOCK_VALUE], dtype=tl.float32)
    total = 0.0
    for first in range(0, parts, BLOCK_PARTS):
        some = first + tl.arange(0, BLOCK_PARTS)
        logsum = tl.load(logsum_ptr + low + some, mask=some < parts, other=float("-inf"))
        mask = (logsum != float("-inf"))[:, None] & (columns < VALUE_HEAD)[None, :]
        part = tl.load(partial_ptr + (low + some)[:, None] * VALUE_HEAD + columns[None, :], mask=mask, other=0.0)
        weights = tl.exp2(logsum - reference)
        total += tl.sum(weights, 0)
        acc += tl.sum(part * weights[:, None], 0)
    if HAS_SINKS:
        total += tl.exp2(sink - reference)
    output = acc / tl.where(total == 0, 1.0, total)
    if faults_ptr is not None:
        fault = first_fault(faults_ptr, sequence * kv_heads + head // GROUP, steps, step)
        output = tl.where(step >= fault, float("nan"), output)
    output = tl.where(broken, float("nan"), output)
    output = tl.where(step < new, output, 0.0)
    tl.store(output_ptr + head_row * VALUE_HEAD + columns, narrow(output, output_ptr.dtype.element_ty),
             mask=columns < VALUE_HEAD)


def constants(*, group: int, head: int, value_head: int, tiles: Tiles, window: bool, softcap: bool,
              ring: bool = False) -> dict[str, Any]:
    """The compile-time arguments of decode."""
    return {"GROUP": group, "HEAD": head, "VALUE_HEAD": value_head, "BLOCK_HEAD": block(head),
            "BLOCK_VALUE": block(value_head), "BLOCK_ROWS": tiles.rows, "BLOCK_KEYS": tiles.keys,
            "BLOCK_SEQUENCES": SEQUENCES, "HAS_WINDOW": window, "HAS_SOFTCAP": softcap, "RING": ring,
            "PRECISION": "ieee"}


def combine_constants(*, group: int, value_head: int, sinks: bool, ring: bool = False) -> dict[str, Any]:
    """The compile-time arguments of combine."""
    return {"GROUP": group, "VALUE_HEAD": value_head, "BLOCK_VALUE": block(value_head), "BLOCK_PARTS": COMBINE_PARTS,
            "ALL_PARTS": MOST_PARTS, "HAS_SINKS": sinks, "RING": ring}


def decode(query: torch.Tensor, past_key: torch.Tensor, past_value: torch.Tensor, past_lengths: torch.Tensor,
           new_lengths: torch.Tensor | None, sinks: torch.Tensor | None, output: torch.Tensor, *,
           num_heads: int, scale: float, softcap: float, window: int, tiles: Tiles, programs: int,
           ring: bool = False, codes: Codes | None = None) -> None:
    """Write output [B, S, H*E] from query [B, S, H*D] and caches that hold the new tokens already. Two launches.

    new_lengths: None for S new tokens in every sequence. ring: the caches are. codes: the caches hold them. The
    workspace's size depends on shapes, tiles and programs alone.
    """
    batch, steps, _ = query.shape
    kv_heads, capacity, head = past_key.shape[1:]
    value_head, group = past_value.shape[3], num_heads // kv_heads
    sizes = plan.workspace_elements(batch, steps, num_heads, kv_heads, value_head, tiles.rows, programs)
    partial, logsum, ranges = (torch.empty(size, dtype=dtype, device=query.device) for size, dtype in zip(
        sizes, (torch.float32, torch.float32, torch.int64), strict=True))
    decode_kernel[(programs,)](
        query, past_key, past_value, past_lengths, new_lengths, partial, logsum, ranges, batch, kv_heads, steps,
        capacity, plan.LEAST_KEYS, window, scale if codes is None else scale * codes.key_scale, softcap,
        None if codes is None else codes.value_scale,
        **constants(group=group, head=head, value_head=value_head, tiles=tiles, window=window > 0, softcap=softcap > 0,
                    ring=ring),
        num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=FP_FUSION)
    combine_kernel[(batch * steps * num_heads,)](
        partial, logsum, ranges, past_lengths, new_lengths, query if sinks is None else sinks, output, kv_heads, steps,
        capacity - window + 1 if ring else capacity, None if codes is None else codes.faults,
        **combine_constants(group=group, value_head=value_head, sinks=sinks is not None, ring=ring),
        num_warps=COMBINE_WARPS, num_stages=COMBINE_STAGES, enable_fp_fusion=COMBINE_FP_FUSION)
