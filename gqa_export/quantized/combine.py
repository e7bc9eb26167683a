"""Matrices made of others, lazily: rows in another order, some of them, several matrices one below the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .matrix import QuantizedMatrix, Stripe

Array = Any
"""a numpy array"""
APART = "the matrices that it is made of do not have one static scale for their inputs"


def reordered(matrix: QuantizedMatrix, order: Array) -> QuantizedMatrix:
    """The matrix `[len(order), K]` whose row i is row `order[i]`. Rows that are read together should lie together."""

    def read(start: int, stop: int) -> Stripe:
        rows = order[start:stop]
        first, last = (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)
        return matrix.stripe(first, last).rows(rows - first)

    return replace(matrix, shape=(len(order), matrix.columns), read=read, in_place="",
                   scales_in_place="", row_block=matrix.row_block if matrix.row_block >= matrix.rows else 1)


def some_rows(matrix: QuantizedMatrix, start: int, stop: int) -> QuantizedMatrix:
    """The rows [start, stop) as a matrix."""
    return replace(matrix, shape=(stop - start, matrix.columns), in_place="", scales_in_place="",
                   read=lambda first, last: matrix.stripe(start + first, start + last),
                   row_block=matrix.row_block if matrix.row_block >= matrix.rows or not start % matrix.row_block else 1)


def joinable(parts: Sequence[QuantizedMatrix]) -> bool:
    """Whether the parts differ in nothing but their rows (and the static scale of an input, which their whole lacks
    then)."""

    def form(part: QuantizedMatrix) -> tuple[Any, ...]:
        arrays = tuple(None if each is None else each.tobytes() for each in (part.column_order, part.column_scale))
        return (part.columns, part.bits, part.block, part.kind, part.offset, part.global_scale, part.transposed,
                part.scale_dtype, part.powers, *arrays)

    return len({form(part) for part in parts}) == 1


def joined(parts: Sequence[QuantizedMatrix], shape: tuple[int, ...] | None = None) -> QuantizedMatrix:
    """The parts one below the other, as `shape` if that is given.

    Raises:
        ValueError: their forms differ.
    """
    if not joinable(parts):
        raise ValueError(f"matrices of different forms: {', '.join(sorted({part.label for part in parts}))}")
    starts = np.cumsum([0, *(part.rows for part in parts)])
    shape = shape or (int(starts[-1]), parts[0].columns)

    def read(start: int, stop: int) -> Stripe:
        found = [part.stripe(max(start - first, 0), min(stop - first, part.rows)) for part, first in
                 zip(parts, starts.tolist()) if first < stop and first + part.rows > start]
        if not found:
            return parts[0].stripe(0, 0)
        return found[0] if len(found) == 1 else _below(found)

    names = tuple(dict.fromkeys(name for part in parts for name in part.tensors))
    blocks = {part.row_block for part in parts}
    same = len(blocks) == 1 and all(part.rows % part.row_block == 0 for part in parts)
    inputs = {part.input_scale for part in parts}
    why = APART if len(inputs) > 1 else parts[0].no_input_scale
    return replace(parts[0], shape=shape, read=read, tensors=names, in_place="", scales_in_place="",
                   input_scale=inputs.pop() if len(inputs) == 1 else None, no_input_scale=why,
                   row_block=blocks.pop() if same else 1)


def one_scale(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """The matrix without a second scale of the whole, which its scales contain, rounded to float32."""
    if matrix.global_scale == 1.0:
        return matrix

    def read(start: int, stop: int) -> Stripe:
        found = matrix.stripe(start, stop)
        scale = (found.scale.astype(np.float64) * matrix.global_scale).astype(np.float32)
        return replace(found, scale=scale)

    return replace(matrix, global_scale=1.0, scale_dtype="float32", powers=False, read=read, scales_in_place="")


def stacked(experts: Sequence[Sequence[QuantizedMatrix]]) -> QuantizedMatrix | None:
    """Experts `[E, N, K]`, each of matrices one below the other; None where their forms differ in more than the order
    of an expert's columns. Their numbers of rows are those of the first."""
    if not all(joinable(parts) for parts in experts):
        return None
    orders = [parts[0].column_order for parts in experts]
    flat = [replace(part, column_order=None) for parts in experts for part in parts]
    if not joinable(flat):
        return None
    columns = flat[0].columns
    whole = joined(flat, (len(experts), sum(part.rows for part in experts[0]), columns))
    if all(order is None for order in orders):
        return whole
    first = np.arange(columns, dtype=np.int32)
    return replace(whole, column_order=np.stack([first if order is None else order for order in orders]))


def _below(found: Sequence[Stripe]) -> Stripe:
    def together(name: str) -> Array | None:
        each = [getattr(stripe, name) for stripe in found]
        return None if any(values is None for values in each) else np.concatenate(each)

    codes, scale = together("codes"), together("scale")
    return Stripe(codes, scale, together("zero"), together("minimum"))
