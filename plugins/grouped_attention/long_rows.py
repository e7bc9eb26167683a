"""What the kernels for long prompts share: a program's rows, where a segment lies, keys that are named one by one.

Dimensions as in `gqa_export.long_attention_op`. Of a sequence, a call brings rows of at most N leaves. A unit is what a
program's rows belong to: a tile of a leaf (method tiles) or a leaf (hyper). Grids count units by position, not by step,
so that a unit's rows never lie in two leaves; the first and the last one may be cut.

Scratch, one row per (sequence, key/value head), method hyper: for each level the keys in the order of
their places, [levels, C], a segment at its own positions of the level that is the logarithm of its leaves; then, for
each leaf and head of the group, the leaf's rows in the order of theirs, [N, G, leaf]. Never imports torch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from gqa_plugins.grouped_attention.primitives import (
    load_cache,
    online_softmax_update,
    scores_base2,
    sequence_lengths,
)

STEPS = tl.constexpr(1 << 16)  # of a fraction: long_attention_op.STEPS


@triton.jit
def whole_lengths(past_lengths_ptr, new_lengths_ptr, sequence, steps, capacity):
    """(past, new, broken, new of the output's rows): a sequence with broken lengths has past 0 and new 0."""
    past, new, broken = sequence_lengths(past_lengths_ptr, new_lengths_ptr, sequence, steps, capacity)
    return tl.where(broken, 0, past), tl.where(broken, 0, new), broken, new


@triton.jit
def unit_rows(past, new, steps, unit, LEAF: tl.constexpr, UNIT: tl.constexpr):
    """(leaf's number, first step, steps in all, valid steps) of a unit; none where the call ends before it."""
    leaf = past // LEAF + unit // (LEAF // UNIT)
    start = leaf * LEAF + unit % (LEAF // UNIT) * UNIT - past
    first = tl.maximum(start, 0)
    count = tl.maximum(tl.minimum(start + UNIT, steps) - first, 0)
    valid = tl.maximum(tl.minimum(start + UNIT, new) - first, 0)
    return leaf, first, count, valid


@triton.jit
def bits_of(number):
    """How many bits a number from 0 to 2^31 - 1 has."""
    bits = number * 0
    for bit in tl.static_range(31):
        bits += tl.where(number >> bit > 0, 1, 0)
    return bits


@triton.jit
def level_of(leaves):
    """The logarithm of a power of two."""
    return bits_of(leaves) - 1


@triton.jit
def sampled(fractions_ptr, kv_head, tile, width, SAMPLES: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """(indices of a tile of samples in a span of `width` keys, which there are, their weight's logarithm to base 2)."""
    count = tl.minimum(width, SAMPLES)
    number = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    present = number < count
    fraction = tl.load(fractions_ptr + kv_head * SAMPLES + number, mask=present, other=0)
    place = number.to(tl.int64) * STEPS + fraction  # beyond 32 bits from 32,768 samples on
    index = place * width // (count.to(tl.int64) * STEPS)
    weight = tl.log2(width.to(tl.float32) / count.to(tl.float32))
    return tl.where(present, index, 0).to(tl.int32), present, weight


@triton.jit
def attend_named(acc, top, total, query, key_base, value_base, positions, present, visible, weight, limit, scale,
                 softcap, HEAD: tl.constexpr, VALUE_HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr,
                 BLOCK_VALUE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
                 HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Attend to one tile of keys at `positions`, where present and, row by row, visible.

    weight: added to their scores, the logarithm to base 2 of how many keys each stands for.
    """
    here = tl.where(present, positions, limit)
    key = load_cache(key_base, here, limit, HEAD, BLOCK_HEAD, True)
    scores = scores_base2(query, key, scale, softcap, HAS_SOFTCAP, PRECISION, BLOCK_ROWS, BLOCK_KEYS) + weight
    scores = tl.where(visible & present[None, :], scores, float("-inf"))
    value = load_cache(value_base, here, limit, VALUE_HEAD, BLOCK_VALUE, True)
    return online_softmax_update(scores, value, acc, top, total, PRECISION)
