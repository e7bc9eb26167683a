"""Prefill: flash attention over the cache, new tokens included, one program per row tile. Causal, bottom-right.

Runs after `append`. Dimensions as in `gqa_export.attention_op`. Grid: (row tiles, K, B), the last rows first, since
they see most. Positions outside the causal band and outside the window are never read; only the tiles at the two edges
of the band are masked. Source: Dao, 2023 (arXiv:2307.08691).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from gqa_plugins.grouped_attention.codes import Codes
from gqa_plugins.grouped_attention.plan import FP_FUSION, Tiles, block
from gqa_plugins.grouped_attention.primitives import (
    LOG2E,
    attend,
    attend_ahead,
    first_fault,
    key_range,
    load_rows,
    sequence_lengths,
    store_rows,
)

ARGUMENTS = (
    ("query_ptr", "*T"), ("key_ptr", "*C"), ("value_ptr", "*C"), ("past_lengths_ptr", "*i32"),
    ("new_lengths_ptr", "*i32"), ("sinks_ptr", "*T"), ("output_ptr", "*T"), ("kv_heads", "i32"), ("steps", "i32"),
    ("capacity", "i32"), ("window", "i32"), ("scale", "fp32"), ("softcap", "fp32"),
)
CODED_ARGUMENTS = (("value_scale", "fp32"),)
"""what follows where the cache holds codes, and `append.FAULTS` after it where there are new keys"""


@triton.jit(do_not_specialize=["kv_heads", "steps", "capacity", "window"])
def prefill_kernel(query_ptr, key_ptr, value_ptr, past_lengths_ptr, new_lengths_ptr, sinks_ptr, output_ptr,
                   kv_heads, steps, capacity, window, scale, softcap, value_scale, faults_ptr,
                   GROUP: tl.constexpr, HEAD: tl.constexpr, VALUE_HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr,
                   BLOCK_VALUE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
                   HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
                   SPLIT_BAND: tl.constexpr, AHEAD: tl.constexpr, RING: tl.constexpr, PRECISION: tl.constexpr):
    """SPLIT_BAND: a loop of its own, unmasked, for the inside of the band. Not for fp32, bound by its products.

    AHEAD: that loop works out the next tile's products beside this tile's softmax (`attend_ahead`); not for a negative
    scale. (To turn the query's sign instead would put it through registers, and ptxas then waits before the softmax.)
    RING: the capacity is slots, used again. value_scale: of a cache of codes, None of one of numbers (that of its keys
    is in scale); faults_ptr: as of `append`, None where no code is new.
    """
    sequence = tl.program_id(2).to(tl.int64)
    kv_head = tl.program_id(1)
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_ROWS
    room = capacity
    slots = None
    if RING:
        room = capacity - window + 1
        slots = capacity
    past, new, broken = sequence_lengths(past_lengths_ptr, new_lengths_ptr, sequence, steps, room, RING)

    rows = first_row + tl.arange(0, BLOCK_ROWS)
    step, member = rows // GROUP, rows % GROUP
    valid = step < new
    head_row = (sequence * steps + step) * (kv_heads * GROUP) + kv_head * GROUP + member
    query = load_rows(query_ptr, head_row * HEAD, valid, HEAD, BLOCK_HEAD)
    row_positions = past + step
    first_step, last_step = first_row // GROUP, tl.minimum((first_row + BLOCK_ROWS - 1) // GROUP, new - 1)
    low, high = key_range(past, new, broken, first_step, last_step, window, HAS_WINDOW)
    # The band's inside, full_low .. full_high - 1: every valid row sees all of it, so nothing there is masked.
    full_low, full_high = high, high
    if SPLIT_BAND:
        full_low, full_high = low, tl.minimum(past + first_step + 1, high)
        if HAS_WINDOW:
            passed = tl.maximum(past + last_step - window + 1 - low, 0)
            full_low = tl.minimum(low + tl.cdiv(passed, BLOCK_KEYS) * BLOCK_KEYS, high)
        full_high = full_low + tl.maximum(full_high - full_low, 0) // BLOCK_KEYS * BLOCK_KEYS

    acc = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], dtype=tl.float32)
    if HAS_SINKS:
        top = tl.load(sinks_ptr + kv_head * GROUP + member).to(tl.float32) * LOG2E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    else:
        top = tl.full([BLOCK_ROWS], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    cache_head = (sequence * kv_heads + kv_head) * capacity
    key_base, value_base = key_ptr + cache_head * HEAD, value_ptr + cache_head * VALUE_HEAD
    if AHEAD:
        acc, top, total = attend_ahead(acc, top, total, query, key_base, value_base, full_low,
                                       (full_high - full_low) // BLOCK_KEYS, scale, softcap, HEAD, VALUE_HEAD,
                                       BLOCK_HEAD, BLOCK_VALUE, BLOCK_ROWS, BLOCK_KEYS, HAS_SOFTCAP, PRECISION, slots)
    elif SPLIT_BAND:
        acc, top, total = attend(acc, top, total, query, key_base, value_base, row_positions, full_low, full_high,
                                 full_high, full_high, window, scale, softcap, HEAD, VALUE_HEAD, BLOCK_HEAD,
                                 BLOCK_VALUE, BLOCK_ROWS, BLOCK_KEYS, HAS_WINDOW, HAS_SOFTCAP, PRECISION, False, slots)
    acc, top, total = attend(acc, top, total, query, key_base, value_base, row_positions, low, high, full_low,
                             full_high, window, scale, softcap, HEAD, VALUE_HEAD, BLOCK_HEAD, BLOCK_VALUE, BLOCK_ROWS,
                             BLOCK_KEYS, HAS_WINDOW, HAS_SOFTCAP, PRECISION, True, slots)

    output = acc / tl.where(total == 0, 1.0, total)[:, None]
    if value_scale is not None:
        output = output * value_scale
    if faults_ptr is not None:
        fault = first_fault(faults_ptr, sequence * kv_heads + kv_head, steps, last_step)
        output = tl.where((step >= fault)[:, None], float("nan"), output)
    output = tl.where(broken, float("nan"), output)
    output = tl.where(valid[:, None], output, 0.0)
    store_rows(output_ptr, head_row * VALUE_HEAD, output, step < steps, VALUE_HEAD, BLOCK_VALUE)


def constants(*, group: int, head: int, value_head: int, tiles: Tiles, window: bool, softcap: bool,
              sinks: bool, split_band: bool, ahead: bool, ring: bool = False) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    return {"GROUP": group, "HEAD": head, "VALUE_HEAD": value_head, "BLOCK_HEAD": block(head),
            "BLOCK_VALUE": block(value_head), "BLOCK_ROWS": tiles.rows, "BLOCK_KEYS": tiles.keys,
            "HAS_WINDOW": window, "HAS_SOFTCAP": softcap, "HAS_SINKS": sinks, "SPLIT_BAND": split_band,
            "AHEAD": ahead, "RING": ring, "PRECISION": "ieee"}


def prefill(query: torch.Tensor, past_key: torch.Tensor, past_value: torch.Tensor, past_lengths: torch.Tensor,
            new_lengths: torch.Tensor | None, sinks: torch.Tensor | None, output: torch.Tensor, *,
            num_heads: int, scale: float, softcap: float, window: int, tiles: Tiles, ahead: bool = False,
            ring: bool = False, codes: Codes | None = None) -> None:
    """Write output [B, S, H*E] from query [B, S, H*D] and caches that hold the new tokens already. One launch.

    new_lengths: None for S new tokens in every sequence. ahead: work out the next tile's products beside this tile's
    softmax, where there are tiles that every row sees (not in fp32, nor for a negative scale). ring: the caches are.
    codes: the caches hold them.
    """
    batch, steps, _ = query.shape
    kv_heads, capacity, head = past_key.shape[1:]
    narrow = query.element_size() < 4
    group = num_heads // kv_heads
    prefill_kernel[(-(-steps * group // tiles.rows), kv_heads, batch)](
        query, past_key, past_value, past_lengths, new_lengths, query if sinks is None else sinks, output, kv_heads,
        steps, capacity, window, scale if codes is None else scale * codes.key_scale, softcap,
        *((None, None) if codes is None else (codes.value_scale, codes.faults)),
        **constants(group=group, head=head, value_head=past_value.shape[3], tiles=tiles, window=window > 0,
                    softcap=softcap > 0, sinks=sinks is not None, split_band=narrow,
                    ahead=ahead and narrow and scale >= 0, ring=ring),
        num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=FP_FUSION)
