"""Arithmetic, logic, comparisons, conversions and moves: what a thread does with its own registers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np

from .block import Block, Read, Step, read, write
from .numbers_of_ptx import (
    COMPARISONS,
    TYPES,
    WORDS,
    Array,
    flush,
    from_fp8,
    made_up_error,
    narrow,
    to_fp8,
    widen,
)
from .program import Instruction, number, registers

EX2_ERROR, DIVISION_ERROR = 2.0**-22.5, 2.0**-22  # relative; the PTX manual's bounds for ex2.approx and div.full
BITWISE: dict[str, Callable[..., Any]] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
INTEGER: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "min": np.minimum, "max": np.maximum,
    "neg": operator.neg, "abs": np.abs, "mad": lambda a, b, c: a * b + c,
}
FLOAT: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg,
    "abs": np.abs, "ex2": lambda a: np.exp2(a.astype(np.float64)), "lg2": np.log2, "rcp": lambda a: np.float32(1) / a,
    "fma": lambda a, b, c: a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64),
}
EXTREMES: dict[tuple[str, bool], Callable[..., Any]] = {  # max and min drop a NaN, with .NaN they keep it
    ("max", False): np.fmax, ("min", False): np.fmin, ("max", True): np.maximum, ("min", True): np.minimum,
}


def make(instruction: Instruction, approximate: bool) -> Step | None:
    """The step of an instruction of this family, or None."""
    base, kind = instruction.base, instruction.kind
    if base in ("mov", "setp", "selp", "cvt", "shl", "shr", "shf", "bfe", "prmt", "not"):
        return {"mov": _move, "setp": _compare, "selp": _select, "cvt": _convert, "shl": _shift, "shr": _shift,
                "shf": _funnel_shift, "bfe": _extract, "prmt": _permute, "not": _not}[base](instruction)
    if base == "popc":
        return _simple(instruction, _ones, [f"u{kind[1:]}"])
    if base in BITWISE:
        return _simple(instruction, BITWISE[base], [kind, kind])
    if kind == "f32x2":
        return _pair(instruction)
    if kind in ("f16x2", "bf16x2") and base in ("add", "sub", "mul"):
        return _short_pair(instruction)
    if kind == "f32" and (base in FLOAT or (base, False) in EXTREMES):
        return _float(instruction, approximate)
    if base in INTEGER:
        return _integer(instruction)
    if base in ("div", "rem"):
        return _simple(instruction, _quotient if base == "div" else _remainder, [kind, kind])
    return None


def _ones(value: Array) -> Array:
    """How many bits are set."""
    return np.asarray(np.bitwise_count(value), np.int32)


def _simple(instruction: Instruction, function: Callable[..., Array], kinds: list[str]) -> Step:
    """A function of the operands, read as `kinds`."""
    values = [read(token, kind) for token, kind in zip(instruction.operands[1:], kinds, strict=True)]
    name = instruction.operands[0]
    return lambda block, mask: write(block, name, function(*(value(block) for value in values)), mask)


def _integer(instruction: Instruction) -> Step:
    base, kind = instruction.base, instruction.kind
    modifiers = set(instruction.parts[1:-1])
    assert modifiers <= {"lo", "hi", "wide", "relu"}, instruction
    count = len(instruction.operands) - 1
    if "hi" in modifiers:
        return _simple(instruction, _high_half, [kind] * 2)
    function = INTEGER[base]
    if "wide" in modifiers:
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        product, kinds = function, [kind, kind, wide][:count]
        return _simple(instruction, lambda a, b, *c: product(a.astype(TYPES[wide]), b.astype(TYPES[wide]), *c), kinds)
    if "relu" in modifiers:
        return _simple(instruction, lambda *values: np.maximum(function(*values), 0), [kind] * count)
    return _simple(instruction, function, [kind] * count)


def _high_half(a: Array, b: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    product = [int(x) * int(y) >> bits & (2**bits - 1) for x, y in zip(a, b, strict=True)]
    return np.array(product, WORDS[a.dtype.itemsize])


def _quotient(a: Array, b: Array) -> Array:
    """Towards zero; 0 where the divisor is 0, which is unspecified."""
    divisor = np.where(b == 0, np.ones_like(b), b).astype(object)
    found = np.abs(a.astype(object)) // np.abs(divisor)
    return np.where((a < 0) != (b < 0), -found, found).astype(a.dtype) * (b != 0).astype(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return a - _quotient(a, b) * b


def _float(instruction: Instruction, approximate: bool) -> Step:
    base, modifiers = instruction.base, set(instruction.parts[1:-1])
    assert modifiers <= {"rn", "ftz", "full", "approx", "NaN"}, instruction
    flushing = "ftz" in modifiers
    error = {"ex2": EX2_ERROR, "div": DIVISION_ERROR}.get(base, 0.0) if approximate and "rn" not in modifiers else 0.0
    if base in ("max", "min"):
        two = EXTREMES[base, "NaN" in modifiers]

        def function(*values: Array) -> Array:  # three operands from sm_100 on
            return reduce(two, values)
    else:
        function = FLOAT[base]

    def apply(*values: Array) -> Array:
        given = [flush(value) for value in values] if flushing else values
        found = np.asarray(function(*given)).astype(np.float32)
        if error:
            found = made_up_error(found, error)
        return flush(found) if flushing else found

    return _simple(instruction, apply, ["f32"] * (len(instruction.operands) - 1))


def _pair(instruction: Instruction) -> Step:
    """Two fp32 in 64 bits: add, sub, mul or fma of each."""
    function = FLOAT[instruction.base]

    def apply(*values: Array) -> Array:
        halves = [np.ascontiguousarray(value).view(np.float32).reshape(-1, 2) for value in values]
        return np.ascontiguousarray(function(*halves).astype(np.float32)).view(np.uint64).reshape(-1)

    return _simple(instruction, apply, ["b64"] * (len(instruction.operands) - 1))


def _short_pair(instruction: Instruction) -> Step:
    """Two f16 or bf16 in 32 bits: add, sub or mul of each, rounded once."""
    function, kind = FLOAT[instruction.base], instruction.kind[:-2]
    assert set(instruction.parts[1:-1]) <= {"rn"}, instruction

    def apply(*values: Array) -> Array:
        halves = [widen(np.ascontiguousarray(value).view(np.uint16), kind) for value in values]
        return np.ascontiguousarray(narrow(function(*halves), kind)).view(np.uint32)

    return _simple(instruction, apply, ["b32"] * (len(instruction.operands) - 1))


def _compare(instruction: Instruction) -> Step:
    test, kind = instruction.parts[1], instruction.kind
    unordered = kind == "f32" and test.endswith("u") and test != "lu"
    function = COMPARISONS[test[:-1] if unordered else test]

    def apply(a: Array, b: Array) -> Array:
        if kind != "f32":
            return function(a, b)
        nan = np.isnan(a) | np.isnan(b)
        return function(a, b) | nan if unordered else function(a, b) & ~nan

    assert len(instruction.parts) == 3 or instruction.parts[2:-1] == ("ftz",), instruction
    return _simple(instruction, apply, [kind, kind])


def _select(instruction: Instruction) -> Step:
    kind = f"b{instruction.kind[1:]}"
    return _simple(instruction, lambda a, b, chosen: np.where(chosen, a, b), [kind, kind, "pred"])


def _not(instruction: Instruction) -> Step:
    return _simple(instruction, np.invert, [instruction.kind])


def _shift(instruction: Instruction) -> Step:
    left, bits = instruction.base == "shl", int(instruction.kind[1:])

    def apply(values: Array, amounts: Array) -> Array:
        by = np.minimum(amounts, np.uint32(bits - 1)).astype(values.dtype)
        shifted = np.left_shift(values, by) if left else np.right_shift(values, by)
        if values.dtype.kind == "i" and not left:
            return shifted  # the sign fills it
        return np.where(amounts >= bits, np.zeros_like(values), shifted)

    return _simple(instruction, apply, [instruction.kind, "b32"])


def _funnel_shift(instruction: Instruction) -> Step:
    left, wraps = instruction.parts[1] == "l", instruction.parts[2] == "wrap"

    def apply(low: Array, high: Array, amounts: Array) -> Array:
        by = (amounts & np.uint32(31) if wraps else np.minimum(amounts, np.uint32(32))).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
        found = both << by >> np.uint64(32) if left else both >> by
        return (found & np.uint64(0xFFFFFFFF)).astype(np.uint32)

    return _simple(instruction, apply, ["b32", "b32", "b32"])


def _extract(instruction: Instruction) -> Step:
    signed = instruction.kind == "s32"

    def apply(values: Array, place: Array, length: Array) -> Array:
        size = length.astype(np.int64)
        found = values.astype(np.int64) >> place.astype(np.int64) & ((1 << size) - 1)
        if signed:
            found = np.where(found >> np.maximum(size - 1, 0) & (size > 0), found - (1 << size), found)
        return (found & 0xFFFFFFFF).astype(np.uint32)

    return _simple(instruction, apply, ["b32", "b32", "b32"])


def _permute(instruction: Instruction) -> Step:
    selector = number(instruction.operands[3])
    chosen = [selector >> 4 * i & 0x7 for i in range(4)]
    signs = np.array([selector >> 4 * i & 0x8 for i in range(4)], bool)  # there the byte's sign, eight times

    def apply(a: Array, b: Array) -> Array:
        both = np.concatenate([np.ascontiguousarray(x).view(np.uint8).reshape(-1, 4) for x in (a, b)], 1)
        taken = both[:, chosen]
        taken = np.where(signs, (taken >> 7) * np.uint8(255), taken)
        return np.ascontiguousarray(taken).view(np.uint32).reshape(-1)

    shorter = Instruction(instruction.opcode, instruction.operands[:3])
    return _simple(shorter, apply, ["b32", "b32"])


def _move(instruction: Instruction) -> Step:
    target, source = instruction.operands
    kind = instruction.kind
    if target.startswith("{"):
        return _unpack(registers(target), read(source, kind), int(kind[1:]) // 8)
    if source.startswith("{"):
        return _pack(target, registers(source), int(kind[1:]) // 8)
    return _simple(instruction, lambda values: values, [kind if kind == "pred" else f"b{kind[1:]}"])


def _unpack(names: list[str], source: Read, size: int) -> Step:
    def step(block: Block, mask: Array | None) -> None:
        parts = np.ascontiguousarray(source(block)).view(WORDS[size // len(names)]).reshape(-1, len(names))
        for i, name in enumerate(names):
            write(block, name, parts[:, i].copy(), mask)

    return step


def _pack(target: str, names: list[str], size: int) -> Step:
    width = size // len(names)
    values = [read(name, f"b{8 * width}") for name in names]

    def step(block: Block, mask: Array | None) -> None:
        parts = np.stack([value(block) for value in values], 1)
        write(block, target, np.ascontiguousarray(parts).view(WORDS[size]).reshape(-1), mask)

    return step


def _convert(instruction: Instruction) -> Step:
    modifiers, (to, source) = instruction.parts[1:-2], instruction.parts[-2:]
    if "e4m3x2" in (to, source):
        return _convert_fp8(instruction, modifiers, to, source)
    assert set(modifiers) <= {"rn", "ftz"}, instruction
    if (to, source) == ("bf16", "f16"):
        return _simple(instruction, lambda bits: narrow(widen(bits, "f16"), "bf16"), ["b16"])
    if to in ("bf16x2", "f16x2"):
        kind = to[:-2]
        return _simple(instruction, lambda high, low: narrow(low, kind).astype(np.uint32)
                       | narrow(high, kind).astype(np.uint32) << np.uint32(16), ["f32", "f32"])
    if source in ("bf16", "f16"):
        assert to == "f32", instruction
        return _simple(instruction, lambda bits: widen(bits, source), ["b16"])
    if to in ("bf16", "f16"):
        assert source in ("f32", "s16"), instruction
        if source == "s16":
            return _simple(instruction, lambda values: narrow(values.astype(np.float32), to), ["s16"])
        return _simple(instruction, lambda values: narrow(values, to), ["f32"])
    assert to == "f32" or source != "f32", instruction
    return _simple(instruction, lambda values: values.astype(TYPES[to]), [source])


def _convert_fp8(instruction: Instruction, modifiers: Sequence[str], to: str, source: str) -> Step:
    """Two e4m3 in 16 bits, the first operand (of numbers) or the high half (of codes) in the high byte."""
    if to == "e4m3x2":
        assert (source, set(modifiers)) == ("f32", {"rn", "satfinite"}), instruction
        return _simple(instruction, lambda high, low: to_fp8(high).astype(np.uint16) << np.uint16(8)
                       | to_fp8(low).astype(np.uint16), ["f32", "f32"])
    assert (to in ("f16x2", "bf16x2"), set(modifiers)) == (True, {"rn"}), instruction
    kind = to[:-2]
    return _simple(instruction, lambda codes: narrow(from_fp8(codes & np.uint16(0xFF)), kind).astype(np.uint32)
                   | narrow(from_fp8(codes >> np.uint16(8)), kind).astype(np.uint32) << np.uint32(16), ["b16"])
