"""Named Triton helpers that the attention kernels are made of. Never imports torch.

Rows: the H/K query heads of a group and the S new tokens of a sequence share one tile; row r is token r // GROUP,
head r % GROUP of the group. That is how each key and value is read once for the whole group, at any group size.

Which keys a tile visits is decided by `key_range` alone, an interval of positions. Kernels for long prompts read lists
of keys instead (`long_attend`).

Source of the recurrence: Milakov and Gimelshein, 2018 (arXiv:1805.02867); Dao, 2023 (arXiv:2307.08691).
"""

from __future__ import annotations

import triton
import triton.language as tl
from gqa_plugins.grouped_attention.plan import APPEND_STEPS, interpreting

INTERPRETED = tl.constexpr(interpreting())
LOG2E = tl.constexpr(1.4426950408889634)
NO_FAULT = tl.constexpr(2**31 - 1)
FAULT_STEPS = tl.constexpr(APPEND_STEPS)  # new tokens whose faults are one number


@triton.jit
def narrow(x, TYPE: tl.constexpr):
    """fp32 to TYPE, to nearest, ties to even. The interpreter truncates to bf16: there the rounding is done by hand."""
    if INTERPRETED and TYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.int32, bitcast=True)
        odd = (bits >> 16) & 1
        x = ((bits + 0x7FFF + odd) & -65536).to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in fp32. Widened when interpreted: the interpreter multiplies the bit patterns of bf16."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tanh(x):
    """Hyperbolic tangent, relative error about 2e-7.

    Near zero 1 - 2 / (exp(2x) + 1) cancels, and the soft cap would multiply what is left of it: a series there.
    The first term left out, 1382/155925 x^11, is 1e-8 of x at 0.25.
    """
    size = tl.abs(x)
    squared = x * x
    series = x * (1 + squared * (-1 / 3 + squared * (2 / 15 + squared * (-17 / 315 + squared * (62 / 2835)))))
    far = 1 - 2 / (tl.exp(2 * size) + 1)
    return tl.where(size < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def sequence_lengths(past_lengths_ptr, new_lengths_ptr, sequence, steps, capacity, RING: tl.constexpr = False):
    """(past, new, broken) of one sequence: new is cut to 0 .. steps; broken lengths give NaN rows, no bad access.

    new_lengths_ptr: None where every sequence has `steps` new tokens; then no tensor is filled for it at every call.
    RING: capacity is how many new tokens the ring takes, whatever the past.
    """
    past = tl.load(past_lengths_ptr + sequence)
    if new_lengths_ptr is None:
        new = steps
    else:
        new = tl.load(new_lengths_ptr + sequence)
    # capacity - new does not overflow where past + new could.
    if RING:
        broken = (past < 0) | (new > steps) | (new > capacity)
    else:
        broken = (past < 0) | (new > steps) | (past > capacity - tl.maximum(new, 0))
    return past, tl.minimum(tl.maximum(new, 0), steps), broken


@triton.jit
def key_range(past, new, broken, first_step, last_step, window, HAS_WINDOW: tl.constexpr):
    """[low, high): every cache position that some valid row of steps first_step .. last_step sees. Maybe empty."""
    low = first_step * 0
    if HAS_WINDOW:
        low = tl.maximum(past + first_step - window + 1, 0)
    high = past + tl.minimum(last_step, new - 1) + 1
    nothing = broken | (first_step >= new)
    return tl.where(nothing, 0, low), tl.where(nothing, 0, high)


@triton.jit
def load_rows(base_ptr, offsets, valid, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """[rows, BLOCK_WIDTH] of query rows at 64-bit element offsets; zero where not valid and past WIDTH."""
    columns = tl.arange(0, BLOCK_WIDTH)
    mask = valid[:, None]
    if WIDTH != BLOCK_WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(base_ptr + offsets[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def encode(x, scale, TYPE: tl.constexpr):
    """fp32 as codes of a cache, to nearest, ties to even, ends for what lies beyond. A NaN is a NaN of fp8, and some
    code of int8.

    int8: the sum with 1.5 * 2^23 leaves no bit for a fraction, and has the code, in two's complement, in its last byte.
    """
    exact = tl.div_rn(x, tl.full(x.shape, scale, dtype=tl.float32))
    if TYPE == tl.int8:  # noqa: SIM300
        exact = tl.minimum(tl.maximum(exact, -128.0), 127.0)
        codes = (exact + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    elif INTERPRETED:
        codes = to_fp8_by_hand(exact)
    else:
        codes = exact.to(TYPE)
    return codes


@triton.jit
def to_fp8_by_hand(x):
    """fp32 to e4m3, to nearest, ties to even, ends for what lies beyond: the interpreter's own conversion does not."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
    # 1.5 * 2^14: the last bit of the sum is 2^-9, the least of e4m3
    small = (size + 24576.0) - 24576.0
    rounded = tl.where(size < 0.015625, small, normal)
    codes = tl.where(x < 0, -rounded, rounded).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return tl.where(x != x, 127, codes).to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def as_type(tile, TYPE: tl.constexpr):
    """What a cache holds as TYPE, in which every code is exact. A cache of numbers is of that type already."""
    if INTERPRETED and tile.dtype != TYPE:
        wide = tile.to(tl.float32)
        if tile.dtype == tl.float8e4nv:  # whose NaN it takes for a number
            wide = tl.where((tile.to(tl.uint8, bitcast=True) & 127) == 127, float("nan"), wide)
        tile = wide
    return tile.to(TYPE)


@triton.jit
def first_fault(faults_ptr, head, steps, last_step):
    """First new token, of those up to last_step's tile, whose key or value in this head (sequence * K + head) is not
    finite: a code cannot say it, so rows from there on are NaN. NO_FAULT: there is none."""
    tiles = tl.cdiv(steps, FAULT_STEPS)
    needed = last_step // FAULT_STEPS + 1
    found = tl.full([64], NO_FAULT, dtype=tl.int32)
    for first in range(0, needed, 64):
        tile = first + tl.arange(0, 64)
        found = tl.minimum(found, tl.load(faults_ptr + head * tiles + tile, mask=tile < needed, other=NO_FAULT))
    return tl.min(found, 0)


@triton.jit
def load_cache(base_ptr, positions, limit, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, MASKED: tl.constexpr,
               first=None, slots=None):
    """[keys, BLOCK_WIDTH] of one head's cache. MASKED: positions at or past limit read as zero, so that a NaN in the
    cache's tail cannot meet a zero weight (0 x NaN is NaN). base_ptr is 64 bits; places * WIDTH fits 32.

    slots: of a ring, None for a cache that keeps all; then positions below limit are first .. first + slots - 1."""
    columns = tl.arange(0, BLOCK_WIDTH)
    if slots is None:
        places = positions
    else:  # one remainder for all of them, and at most one seam among them
        places = positions - first // slots * slots
        places = tl.where(places >= slots, places - slots, places)
    pointers = base_ptr + places[:, None] * WIDTH + columns[None, :]
    if MASKED:
        mask = (positions < limit)[:, None]
        if WIDTH != BLOCK_WIDTH:
            mask = mask & (columns < WIDTH)[None, :]
        tile = tl.load(pointers, mask=mask, other=0.0)
    elif WIDTH != BLOCK_WIDTH:
        tile = tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def scores_base2(query, key, scale, softcap, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
                 BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """[rows, keys] logits times log2(e), so that the softmax is in powers of two (one instruction each)."""
    products = dot(query, tl.trans(key), tl.zeros([BLOCK_ROWS, BLOCK_KEYS], dtype=tl.float32), PRECISION)
    if HAS_SOFTCAP:
        scores = tanh(products * (scale / softcap)) * (softcap * LOG2E)
    else:
        scores = products * (scale * LOG2E)
    return scores


@triton.jit
def online_softmax_update(scores, value, acc, top, total, PRECISION: tl.constexpr):
    """Fold one tile of scores and values into (acc, top, total); a row that has seen nothing keeps top at -inf."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    reference = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf - -inf would be NaN
    weights = tl.exp2(scores - reference[:, None])
    shrink = tl.exp2(top - reference)
    total = total * shrink + tl.sum(weights, 1)
    acc = dot(narrow(weights, value.dtype), value, acc * shrink[:, None], PRECISION)
    return acc, new_top, total


@triton.jit
def attend(acc, top, total, query, key_ptr, value_ptr, row_positions, start, stop, skip_from, skip_to, window, scale,
           softcap, HEAD: tl.constexpr, VALUE_HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_VALUE: tl.constexpr,
           BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
           PRECISION: tl.constexpr, MASKED: tl.constexpr, slots=None):
    """Attend to cache positions start .. stop - 1 without skip_from .. skip_to - 1, a tile at a time. slots: of a ring.

    skip_from is a whole number of tiles past start, or stop. One loop on both sides of the gap: half the code.
    Not MASKED: every valid row sees all of the positions, and all of them are valid.
    """
    before = tl.cdiv(skip_from - start, BLOCK_KEYS)
    tiles = before + tl.cdiv(stop - skip_to, BLOCK_KEYS)
    for tile in range(0, tiles):
        gap = tl.where(tile < before, 0, skip_to - skip_from)
        positions = start + gap + tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        key = as_type(load_cache(key_ptr, positions, stop, HEAD, BLOCK_HEAD, MASKED, start, slots), query.dtype)
        scores = scores_base2(query, key, scale, softcap, HAS_SOFTCAP, PRECISION, BLOCK_ROWS, BLOCK_KEYS)
        if MASKED:
            visible = (positions[None, :] <= row_positions[:, None]) & (positions < stop)[None, :]
            if HAS_WINDOW:
                visible = visible & (positions[None, :] > row_positions[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        value = load_cache(value_ptr, positions, stop, VALUE_HEAD, BLOCK_VALUE, MASKED, start, slots)
        value = as_type(value, query.dtype)
        acc, top, total = online_softmax_update(scores, value, acc, top, total, PRECISION)
    return acc, top, total


@triton.jit
def store_rows(base_ptr, offsets, tile, valid, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, code_scale=None):
    """Write fp32 [rows, BLOCK_WIDTH] as the pointer's type at 64-bit element offsets, where valid and below WIDTH.
    code_scale: write codes, of this scale."""
    columns = tl.arange(0, BLOCK_WIDTH)
    mask = valid[:, None] & (columns < WIDTH)[None, :]
    if code_scale is None:
        narrowed = narrow(tile, base_ptr.dtype.element_ty)
    else:
        narrowed = encode(tile, code_scale, base_ptr.dtype.element_ty)
    tl.store(base_ptr + offsets[:, None] + columns[None, :], narrowed, mask=mask)


@triton.jit
def attend_ahead(acc, top, total, query, key_ptr, value_ptr, start, tiles, scale, softcap, HEAD: tl.constexpr,
                 VALUE_HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_VALUE: tl.constexpr,
                 BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                 PRECISION: tl.constexpr, slots=None):
    """Attend to whole tiles that every row sees. The next tile's products are under way while this tile's softmax is
    worked out (Shah et al., 2024, arXiv:2407.08608, section 3.2, within a warpgroup). scale is not negative.

    Without a condition around it: under one, ptxas waits after every product of the kernel. No tiles cost one product
    of zeros, and the last tile's next one is another.
    """
    zero = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], dtype=tl.float32)
    stop = start + tiles * BLOCK_KEYS
    columns = tl.arange(0, BLOCK_KEYS)
    key = as_type(load_cache(key_ptr, start + columns, stop, HEAD, BLOCK_HEAD, True, start, slots), query.dtype)
    products = dot(query, tl.trans(key), zero, PRECISION)
    for tile in range(0, tiles):
        here = start + tile * BLOCK_KEYS + columns
        key = as_type(load_cache(key_ptr, here + BLOCK_KEYS, stop, HEAD, BLOCK_HEAD, True, start, slots), query.dtype)
        following = dot(query, tl.trans(key), zero, PRECISION)
        if HAS_SOFTCAP:
            factor = 1.0
            products = tanh(products * (scale / softcap)) * (softcap * LOG2E)
        elif BLOCK_HEAD + BLOCK_VALUE > 128:
            factor = scale * LOG2E  # goes into the exponent's multiply-add: scores themselves are never written out
        else:
            factor = 1.0  # folded, ptxas puts this tile's softmax before the next one's products
            products = products * (scale * LOG2E)
        new_top = tl.maximum(top, tl.max(products, 1) * factor)
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(products * factor - reference[:, None])
        shrink = tl.exp2(top - reference)
        total = total * shrink + tl.sum(weights, 1)
        value = as_type(load_cache(value_ptr, here, stop, VALUE_HEAD, BLOCK_VALUE, False, start, slots), query.dtype)
        acc = dot(narrow(weights, value.dtype), value, acc * shrink[:, None], PRECISION)
        top = new_top
        products = following
    return acc, top, total
