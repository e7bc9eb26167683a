"""Decode: attention with the cache split among programs (flash-decoding), then a combine of the partial results.

Runs after `append`. Dimensions as in `gqa_export.attention_op`, N splits. Grid of decode: (row tiles * N, K, B); each
program finds its share of the positions on the device, from the lengths there, so that a captured graph serves every
length. Workspace (fp32): partial [B, K, S * H/K, N, E], normalised, and its log-sum-exp in powers of two
[B, K, S * H/K, N], -inf where a split saw nothing (its partial is then never written nor read).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from gqa_plugins.grouped_attention.plan import (
    COMBINE_SPLITS,
    FP_FUSION,
    MAX_SPLITS,
    Tiles,
    block,
    workspace_elements,
)
from gqa_plugins.grouped_attention.primitives import (
    LOG2E,
    attend,
    key_range,
    load_rows,
    narrow,
    sequence_lengths,
    store_rows,
)

ARGUMENTS = (
    ("query_ptr", "*T"), ("key_ptr", "*T"), ("value_ptr", "*T"), ("past_lengths_ptr", "*i32"),
    ("new_lengths_ptr", "*i32"), ("partial_ptr", "*fp32"), ("logsum_ptr", "*fp32"), ("kv_heads", "i32"),
    ("steps", "i32"), ("capacity", "i32"), ("splits", "i32"), ("window", "i32"), ("scale", "fp32"),
    ("softcap", "fp32"),
)
COMBINE_ARGUMENTS = (
    ("partial_ptr", "*fp32"), ("logsum_ptr", "*fp32"), ("past_lengths_ptr", "*i32"), ("new_lengths_ptr", "*i32"),
    ("sinks_ptr", "*T"), ("output_ptr", "*T"), ("kv_heads", "i32"), ("steps", "i32"), ("capacity", "i32"),
    ("splits", "i32"),
)
COMBINE_WARPS, COMBINE_STAGES, COMBINE_FP_FUSION = 4, 1, False


@triton.jit(do_not_specialize=["kv_heads", "steps", "capacity", "splits", "window"])
def decode_kernel(query_ptr, key_ptr, value_ptr, past_lengths_ptr, new_lengths_ptr, partial_ptr, logsum_ptr,
                  kv_heads, steps, capacity, splits, window, scale, softcap,
                  GROUP: tl.constexpr, HEAD: tl.constexpr, VALUE_HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr,
                  BLOCK_VALUE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
                  HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    sequence = tl.program_id(2).to(tl.int64)
    kv_head = tl.program_id(1)
    first_row = tl.program_id(0) // splits * BLOCK_ROWS
    split = tl.program_id(0) % splits
    past, new, broken = sequence_lengths(past_lengths_ptr, new_lengths_ptr, sequence, steps, capacity)

    rows = first_row + tl.arange(0, BLOCK_ROWS)
    step = rows // GROUP
    valid = step < new
    head_row = (sequence * steps + step) * (kv_heads * GROUP) + kv_head * GROUP + rows % GROUP
    query = load_rows(query_ptr, head_row * HEAD, valid, HEAD, BLOCK_HEAD)

    last_step = (first_row + BLOCK_ROWS - 1) // GROUP
    low, high = key_range(past, new, broken, first_row // GROUP, last_step, window, HAS_WINDOW)
    share = tl.cdiv(tl.cdiv(high - low, BLOCK_KEYS), splits) * BLOCK_KEYS
    start = tl.minimum(low + split * share, high)
    stop = tl.minimum(start + share, high)

    cache_head = (sequence * kv_heads + kv_head) * capacity
    acc = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], dtype=tl.float32)
    top = tl.full([BLOCK_ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    # Masked throughout: a short tile's arithmetic hides behind its loads, and one loop has one prologue.
    acc, top, total = attend(acc, top, total, query, key_ptr + cache_head * HEAD, value_ptr + cache_head * VALUE_HEAD,
                             past + step, start, stop, stop, stop, window, scale, softcap, HEAD, VALUE_HEAD, BLOCK_HEAD,
                             BLOCK_VALUE, BLOCK_ROWS, BLOCK_KEYS, HAS_WINDOW, HAS_SOFTCAP, PRECISION, True)

    # A row that sees anything has a weight of 1 at its top. Not `top` itself: on a GPU max drops a NaN, a sum keeps it.
    seen = total != 0.0
    logsum = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
    slot = ((sequence * kv_heads + kv_head) * (steps * GROUP) + rows) * splits + split
    tl.store(logsum_ptr + slot, logsum, mask=valid)
    partial = acc / tl.where(seen, total, 1.0)[:, None]
    store_rows(partial_ptr, slot * VALUE_HEAD, partial, valid & seen, VALUE_HEAD, BLOCK_VALUE)


@triton.jit(do_not_specialize=["kv_heads", "steps", "capacity", "splits"])
def combine_kernel(partial_ptr, logsum_ptr, past_lengths_ptr, new_lengths_ptr, sinks_ptr, output_ptr,
                   kv_heads, steps, capacity, splits,
                   GROUP: tl.constexpr, VALUE_HEAD: tl.constexpr, BLOCK_VALUE: tl.constexpr,
                   BLOCK_SPLITS: tl.constexpr, ALL_SPLITS: tl.constexpr, HAS_SINKS: tl.constexpr):
    """One program per (sequence, step, query head), the rows of the output in order.

    Compiled without fusion of a * b + c: in a sum over threads each would keep its own product unrounded and get its
    neighbour's rounded, so that threads that hold the same sum would hold different last bits of it.
    """
    head_row = tl.program_id(0).to(tl.int64)
    heads = kv_heads * GROUP
    head, token = (head_row % heads).to(tl.int32), head_row // heads
    sequence, step = token // steps, (token % steps).to(tl.int32)
    _, new, broken = sequence_lengths(past_lengths_ptr, new_lengths_ptr, sequence, steps, capacity)
    written = tl.where((step >= new) | broken, 0, splits)

    slot = ((sequence * kv_heads + head // GROUP) * (steps * GROUP) + step * GROUP + head % GROUP) * splits
    every = tl.arange(0, ALL_SPLITS)
    logsums = tl.load(logsum_ptr + slot + every, mask=every < written, other=float("-inf"))
    top = tl.max(logsums, 0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    reference = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(logsums - reference), 0)
    if HAS_SINKS:
        total += tl.exp2(sink - reference)

    columns = tl.arange(0, BLOCK_VALUE)
    acc = tl.zeros([BLOCK_VALUE], dtype=tl.float32)
    for first in range(0, written, BLOCK_SPLITS):
        some = first + tl.arange(0, BLOCK_SPLITS)
        logsum = tl.load(logsum_ptr + slot + some, mask=some < written, other=float("-inf"))
        mask = (logsum != float("-inf"))[:, None] & (columns < VALUE_HEAD)[None, :]
        part = tl.load(partial_ptr + (slot + some)[:, None] * VALUE_HEAD + columns[None, :], mask=mask, other=0.0)
        acc += tl.sum(part * tl.exp2(logsum - reference)[:, None], 0)
    output = acc / tl.where(total == 0, 1.0, total)
    output = tl.where(broken, float("nan"), output)
    output = tl.where(step < new, output, 0.0)
    tl.store(output_ptr + head_row * VALUE_HEAD + columns, narrow(output, output_ptr.dtype.element_ty),
             mask=columns < VALUE_HEAD)


def constants(*, group: int, head: int, value_head: int, tiles: Tiles, window: bool, softcap: bool) -> dict[str, Any]:
    """The compile-time arguments of decode."""
    return {"GROUP": group, "HEAD": head, "VALUE_HEAD": value_head, "BLOCK_HEAD": block(head),
            "BLOCK_VALUE": block(value_head), "BLOCK_ROWS": tiles.rows, "BLOCK_KEYS": tiles.keys,
            "HAS_WINDOW": window, "HAS_SOFTCAP": softcap, "PRECISION": "ieee"}


def combine_constants(*, group: int, value_head: int, sinks: bool) -> dict[str, Any]:
    """The compile-time arguments of combine."""
    return {"GROUP": group, "VALUE_HEAD": value_head, "BLOCK_VALUE": block(value_head),
            "BLOCK_SPLITS": COMBINE_SPLITS, "ALL_SPLITS": MAX_SPLITS, "HAS_SINKS": sinks}


def decode(query: torch.Tensor, past_key: torch.Tensor, past_value: torch.Tensor, past_lengths: torch.Tensor,
           new_lengths: torch.Tensor | None, sinks: torch.Tensor | None, output: torch.Tensor, *,
           num_heads: int, scale: float, softcap: float, window: int, tiles: Tiles, splits: int) -> None:
    """Write output [B, S, H*E] from query [B, S, H*D] and caches that hold the new tokens already. Two launches.

    new_lengths: None for S new tokens in every sequence. splits: 1 .. MAX_SPLITS. The workspace's size depends on
    shapes and splits alone.
    """
    batch, steps, _ = query.shape
    kv_heads, capacity, head = past_key.shape[1:]
    value_head, group = past_value.shape[3], num_heads // kv_heads
    sizes = workspace_elements(batch, steps, num_heads, value_head, splits)
    partial, logsum = (torch.empty(size, dtype=torch.float32, device=query.device) for size in sizes)
    decode_kernel[(-(-steps * group // tiles.rows) * splits, kv_heads, batch)](
        query, past_key, past_value, past_lengths, new_lengths, partial, logsum, kv_heads, steps, capacity, splits,
        window, scale, softcap,
        **constants(group=group, head=head, value_head=value_head, tiles=tiles, window=window > 0, softcap=softcap > 0),
        num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=FP_FUSION)
    combine_kernel[(batch * steps * num_heads,)](
        partial, logsum, past_lengths, new_lengths, query if sinks is None else sinks, output, kv_heads, steps,
        capacity, splits, **combine_constants(group=group, value_head=value_head, sinks=sinks is not None),
        num_warps=COMBINE_WARPS, num_stages=COMBINE_STAGES, enable_fp_fusion=COMBINE_FP_FUSION)
