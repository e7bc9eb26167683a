"""Append: new keys and values into the static cache, in place; optional rotation of the new keys and queries.

Dimensions as in `gqa_export.attention_op`. Grid: (tiles of 16 new tokens, heads, B); heads are the K key/value heads
(if there are new keys), then the H query heads (if there is a rotation). Bytes bound.

A cache of codes gets them here. faults [B, K, tiles of 16 new tokens] (int32): the first token of each tile whose key
or value is not finite, which no code says (`primitives.first_fault`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from gqa_plugins.grouped_attention.codes import Codes
from gqa_plugins.grouped_attention.plan import APPEND_STEPS, FP_FUSION, block
from gqa_plugins.grouped_attention.primitives import NO_FAULT, load_rows, sequence_lengths, store_rows

ARGUMENTS = (
    ("query_ptr", "*T"), ("key_ptr", "*T"), ("value_ptr", "*T"), ("past_key_ptr", "*C"), ("past_value_ptr", "*C"),
    ("past_lengths_ptr", "*i32"), ("new_lengths_ptr", "*i32"), ("cos_ptr", "*T"), ("sin_ptr", "*T"),
    ("rotated_ptr", "*T"), ("kv_heads", "i32"), ("steps", "i32"), ("capacity", "i32"), ("max_position", "i32"),
)
CODED_ARGUMENTS = (("key_scale", "fp32"), ("value_scale", "fp32"))
"""what follows where the cache holds codes, and `FAULTS` after it where there are new keys"""
FAULTS = (("faults_ptr", "*i32"),)
WARPS, STAGES = 4, 1


@triton.jit
def load_rotated(base_ptr, offsets, row_positions, valid, cos_ptr, sin_ptr, max_position, WIDTH: tl.constexpr,
                 BLOCK_WIDTH: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """fp32 [rows, BLOCK_WIDTH]: the first 2 * HALF features turned by the row's angle, the rest as they are.

    The partner of a feature is read again (from the cache, just loaded): any HALF works, no reshaping.
    """
    columns = tl.arange(0, BLOCK_WIDTH)
    if INTERLEAVED:
        partner, angle, sign = columns ^ 1, columns // 2, tl.where(columns % 2 == 0, -1.0, 1.0)
    else:
        early = columns < HALF
        partner = tl.where(early, columns + HALF, columns - HALF)
        angle, sign = tl.where(early, columns, columns - HALF), tl.where(early, -1.0, 1.0)
    turned = valid[:, None] & (columns < 2 * HALF)[None, :]
    rows = tl.minimum(row_positions, max_position - 1).to(tl.int64) * HALF
    table = rows[:, None] + angle[None, :]
    cos = tl.load(cos_ptr + table, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=turned, other=0.0).to(tl.float32)
    other = tl.load(base_ptr + offsets[:, None] + partner[None, :], mask=turned, other=0.0).to(tl.float32)
    return load_rows(base_ptr, offsets, valid, WIDTH, BLOCK_WIDTH).to(tl.float32) * cos + sign[None, :] * other * sin


@triton.jit
def unlike_numbers(rows):
    """Which rows hold a NaN or an infinity."""
    return tl.max((tl.abs(rows) < float("inf")).to(tl.int32) ^ 1, 1) > 0


@triton.jit(do_not_specialize=["kv_heads", "steps", "capacity", "max_position"])
def append_kernel(query_ptr, key_ptr, value_ptr, past_key_ptr, past_value_ptr, past_lengths_ptr, new_lengths_ptr,
                  cos_ptr, sin_ptr, rotated_ptr, kv_heads, steps, capacity, max_position, key_scale, value_scale,
                  faults_ptr,
                  GROUP: tl.constexpr, HEAD: tl.constexpr, VALUE_HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr,
                  BLOCK_VALUE: tl.constexpr, BLOCK_STEPS: tl.constexpr, HALF: tl.constexpr,
                  INTERLEAVED: tl.constexpr, HAS_NEW: tl.constexpr, RING: tl.constexpr):
    """HALF is R/2, 0 for no rotation. Tokens whose position would be at or past the capacity are dropped. RING: the
    capacity is slots, used again; more new tokens than slots are dropped, all of them. key_scale, value_scale and
    faults_ptr are None where the cache holds numbers."""
    sequence = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    step = tl.program_id(0) * BLOCK_STEPS + tl.arange(0, BLOCK_STEPS)
    past, new, _ = sequence_lengths(past_lengths_ptr, new_lengths_ptr, sequence, steps, capacity)
    new = tl.where(past < 0, 0, new)
    valid = step < new
    row_positions = tl.maximum(past, 0) + step
    token = sequence * steps + step
    query_head = head
    if HAS_NEW:
        query_head = head - kv_heads
        if head < kv_heads:
            place = row_positions
            if RING:
                fits = step < tl.where(new > capacity, 0, new)
                place = row_positions % capacity
            else:
                fits = step < tl.minimum(new, capacity - past)
            source = token * kv_heads + head
            target = (sequence * kv_heads + head) * capacity + place
            if HALF:
                key = load_rotated(key_ptr, source * HEAD, row_positions, fits, cos_ptr, sin_ptr, max_position, HEAD,
                                   BLOCK_HEAD, HALF, INTERLEAVED)
            else:
                key = load_rows(key_ptr, source * HEAD, fits, HEAD, BLOCK_HEAD).to(tl.float32)
            store_rows(past_key_ptr, target * HEAD, key, fits, HEAD, BLOCK_HEAD, key_scale)
            value = load_rows(value_ptr, source * VALUE_HEAD, fits, VALUE_HEAD, BLOCK_VALUE).to(tl.float32)
            store_rows(past_value_ptr, target * VALUE_HEAD, value, fits, VALUE_HEAD, BLOCK_VALUE, value_scale)
            if faults_ptr is not None:
                odd = unlike_numbers(key) | unlike_numbers(value)
                fault = tl.min(tl.where(odd, step, NO_FAULT), 0)
                place = (sequence * kv_heads + head) * tl.num_programs(0) + tl.program_id(0)
                tl.store(faults_ptr + place, fault)
    if HALF:  # noqa: SIM102  (compile-time; the next is not)
        if query_head >= 0:
            row = (token * (kv_heads * GROUP) + query_head) * HEAD
            query = load_rotated(query_ptr, row, row_positions, valid, cos_ptr, sin_ptr, max_position, HEAD,
                                 BLOCK_HEAD, HALF, INTERLEAVED)
            store_rows(rotated_ptr, row, query, valid, HEAD, BLOCK_HEAD)


def constants(*, group: int, head: int, value_head: int, rotary_half: int, interleaved: bool,
              has_new: bool, ring: bool = False) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    return {"GROUP": group, "HEAD": head, "VALUE_HEAD": value_head, "BLOCK_HEAD": block(head),
            "BLOCK_VALUE": block(value_head), "BLOCK_STEPS": APPEND_STEPS, "HALF": rotary_half,
            "INTERLEAVED": bool(interleaved and rotary_half), "HAS_NEW": has_new, "RING": ring}


def append(query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None, past_key: torch.Tensor,
           past_value: torch.Tensor, past_lengths: torch.Tensor, new_lengths: torch.Tensor | None,
           cos: torch.Tensor | None, sin: torch.Tensor | None, *, num_heads: int, interleaved: bool,
           ring: bool = False, codes: Codes | None = None) -> torch.Tensor:
    """Write key and value (if given) into the caches; return the query, rotated if cos and sin are given.

    Tensors as in the contract, contiguous; new_lengths: None for S new tokens in every sequence. ring: the caches are.
    codes: the caches hold them; its faults are written. Launches at most one kernel.
    """
    batch, steps, _ = query.shape
    kv_heads, capacity, head = past_key.shape[1:]
    if key is None and cos is None:
        return query
    rotated = query if cos is None else query.new_empty(query.shape)
    programs = (kv_heads if key is not None else 0) + (num_heads if cos is not None else 0)
    absent = query  # a pointer that the compiled kernel never reads
    append_kernel[(-(-steps // APPEND_STEPS), programs, batch)](
        query, absent if key is None else key, absent if value is None else value, past_key, past_value, past_lengths,
        new_lengths, absent if cos is None else cos, absent if sin is None else sin, rotated, kv_heads, steps, capacity,
        1 if cos is None else cos.shape[0],
        *((None, None, None) if codes is None else (codes.key_scale, codes.value_scale, codes.faults)),
        **constants(group=num_heads // kv_heads, head=head, value_head=past_value.shape[3],
                    rotary_half=0 if cos is None else cos.shape[1], interleaved=interleaved, has_new=key is not None,
                    ring=ring),
        num_warps=WARPS, num_stages=STAGES, enable_fp_fusion=FP_FUSION)
    return rotated
