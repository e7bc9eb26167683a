"""Experts that a model holds stacked in one parameter, each as a matrix of its own.

An expert has the name of its parameter, its number and how many there are: `NAME[3/8]`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from .combine import some_rows
from .facts import MatrixFacts
from .matrix import QuantizedMatrix

_NAME = re.compile(r"(.*)\[(\d+)/(\d+)\]")


def stack_in(shape: Sequence[int], reshaped: Sequence[int]) -> tuple[int, int, int] | None:
    """`[E, R, C]` of a parameter `[E * R, C]` that is reshaped to that (one number may be -1); None where it is made
    something else."""
    sizes = [int(size) for size in reshaped]
    if len(shape) != 2 or len(sizes) != 3:
        return None
    if sizes.count(-1) == 1:
        known = -prod(sizes)
        sizes[sizes.index(-1)] = prod(shape) // known if known else 0
    count, rows, columns = sizes
    return (count, rows, columns) if count > 0 and rows > 0 and [count * rows, columns] == list(shape) else None


def expert_name(name: str, number: int, count: int) -> str:
    """The name of an expert, counted from 0."""
    return f"{name}[{number}/{count}]"


def expert_of(name: str) -> tuple[str, int, int]:
    """The parameter, number and count of an expert by its name; another name, 0 and 0."""
    found = _NAME.fullmatch(name)
    return (found[1], int(found[2]), int(found[3])) if found else (name, 0, 0)


def expert_facts(facts: MatrixFacts, number: int, count: int) -> MatrixFacts:
    """The facts of one of a stack's experts: a matrix `[N, K]`, codes along the columns that a product sums over."""
    rows = facts.shape[-2] if len(facts.shape) > 2 else facts.shape[0] // count
    return replace(facts, shape=(rows, facts.columns), transposed=False,
                   column_order=_order_of(facts.column_order, number))


def _order_of(order: Any, number: int) -> Any:
    return order[number] if order is not None and order.ndim == 2 else order


def matrix_named(name: str, whole: QuantizedMatrix) -> QuantizedMatrix:
    """The matrix of a name: of a parameter, `whole`; of an expert, its part of it."""
    _, number, count = expert_of(name)
    if not count:
        return whole
    rows = whole.rows // count
    single = replace(whole, column_order=_order_of(whole.column_order, number))
    return replace(some_rows(single, number * rows, (number + 1) * rows), transposed=False)
