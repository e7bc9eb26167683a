"""What each number of bits would lose of a matrix's output, measured over all its rows; and the scales it took.

A matrix's relative error is `sum h (w - w')^2 / sum h w^2`: with h the mean square of each column of its input, the
part of its output's energy that rounding changes; without a text h is 1. Where it is known what a squared error of each
output does to predictions (`sensitivity`), the error is that, in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from ..quantized.matrix import QuantizedMatrix
from .rtn import FACTORS, measured_rows, quantize_matrix, squares

Array = Any
"""a numpy array"""
STRIPE_NUMBERS = 1 << 20


@dataclass(frozen=True)
class Measured:
    """A matrix that may have one of several numbers of bits.

    Attributes:
        relative: bits -> relative error.
        nats: bits -> what it does to predictions; empty where that is not known.
        positive: 8 bits have no scale below 0.
        scales: bits -> float16 `[N, blocks]`, where finding them again would take a search.
    """

    rows: Callable[[int, int], Array] = field(repr=False)
    shape: tuple[int, ...]
    block: int
    label: str
    importance: Array | None = field(repr=False)
    relative: dict[int, float]
    nats: dict[int, float]
    scales: dict[int, Array] = field(repr=False)
    positive: bool = False
    transposed: bool = False

    def quantized(self, bits: int) -> QuantizedMatrix:
        """The matrix with so many bits."""
        return quantize_matrix(self.rows, self.shape, bits, self.block, self.label, self.importance,
                               bits == 8 and self.positive, self.scales.get(bits), transposed=self.transposed)


def measure(rows: Callable[[int, int], Array], shape: tuple[int, ...], bits: tuple[int, ...], block: int, label: str,
            importance: Array | None, sensitivity: Array | None = None, positive: bool = False, *,
            transposed: bool = False) -> Measured:
    """Quantize a matrix with each number of bits, and keep of it the errors and the scales alone.

    Args:
        rows, shape, block, label, importance, transposed: as of `quantize_matrix`.
        bits: to try.
        positive: 8 bits have no scale below 0.
        sensitivity: float64 `[N]`, nats for a squared error of each output; None: not known.

    Raises:
        UnsupportedModel: a value is not finite, or a block's scale does not fit float16.
    """
    count, columns = prod(shape[:-1]), shape[-1]
    block = min(block, columns)
    lost, nats, whole = dict.fromkeys(bits, 0.0), dict.fromkeys(bits, 0.0), 0.0
    scales = {each: np.empty((count, -(-columns // block)), np.float16) for each in bits if len(FACTORS[each]) > 1}
    step = max(1, STRIPE_NUMBERS // max(columns, 1))
    for start in range(0, count, step):
        stop = min(start + step, count)
        values = rows(start, stop)
        whole += squares(values, importance)
        for each in bits:
            stripe, errors = measured_rows(values, each, block, label, importance, each == 8 and positive)
            lost[each] += float(errors.sum())
            if sensitivity is not None:
                nats[each] += float(errors @ sensitivity[start:stop])
            if each in scales:
                scales[each][start:stop] = stripe.scale
    return Measured(rows, shape, block, label, importance,
                    {each: error / whole if whole else 0.0 for each, error in lost.items()},
                    nats if sensitivity is not None else {}, scales, positive, transposed)


def in_one_unit(measured: Mapping[str, Measured]) -> tuple[dict[str, dict[int, float]], str]:
    """Name of a matrix -> bits -> error, all in one unit, and that: "nats", or "relative" where nothing is known in
    nats. Matrices whose effect on predictions is not known count as the median of the others does."""
    known = [found for found in measured.values() if found.nats]
    if not known:
        return {name: found.relative for name, found in measured.items()}, "relative"
    lowest = min(known[0].relative)
    factors = [found.nats[lowest] / found.relative[lowest] for found in known if found.relative[lowest]]
    factor = float(np.median(factors)) if factors else 1.0
    return {name: found.nats or {bits: factor * error for bits, error in found.relative.items()}
            for name, found in measured.items()}, "nats"
