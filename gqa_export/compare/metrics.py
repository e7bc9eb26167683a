"""How far apart two outputs are, token by token, and where. In fp64, block by block, so that memory stays small.

Dimensions as in `gqa_export.attention_op`; V vocabulary. Rows that carry no token are zero on both sides by the time
they come here (see `gqa_export.validation.session_runner`), so every element counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .shares import in_shares

BLOCK = 1 << 16
"""elements compared at once: 512 KiB of fp64, which stay in a core's cache from one pass to the next"""


@dataclass(frozen=True)
class Element:
    """One element of an output that was compared. axes: batch, token, head, feature; or batch, token, id."""

    axes: dict[str, int]
    expected: float
    got: float
    gap: float


@dataclass(frozen=True)
class Difference:
    """Per token [B, S]: gap, the largest |got - expected| (inf if anything is not finite); where in the token's
    elements it is, and the two values there. scale: the largest finite |expected| of all. shape: of one token's
    elements, (V,) or (K, D)."""

    gap: np.ndarray
    place: np.ndarray
    expected: np.ndarray
    got: np.ndarray
    scale: float
    nonfinite: int
    shape: tuple[int, ...]

    @property
    def max_abs(self) -> float:
        """The largest gap."""
        return float(self.gap.max()) if self.gap.size else 0.0

    def first_over(self, bound: float) -> Element | None:
        """The earliest token whose gap exceeds the bound (the lowest row of the batch among equals)."""
        over_SB = ~(self.gap <= bound).T
        if not over_SB.any():
            return None
        token, row = (int(i) for i in np.argwhere(over_SB)[0])
        names = ("id",) if len(self.shape) == 1 else ("head", "feature")
        inner = (int(i) for i in np.unravel_index(int(self.place[row, token]), self.shape))
        return Element({"batch": row, "token": token, **dict(zip(names, inner))}, float(self.expected[row, token]),
                       float(self.got[row, token]), float(self.gap[row, token]))


def difference(expected: np.ndarray, got: np.ndarray) -> Difference:
    """Compare logits [B, S, V] or cache rows [B, K, S, D], of any two float types. ValueError if shapes differ."""
    if expected.shape != got.shape:
        raise ValueError(f"shapes differ: {expected.shape} and {got.shape}")
    if expected.ndim == 4:
        expected, got = expected.swapaxes(1, 2), got.swapaxes(1, 2)
    tokens, shape = expected.shape[:2], expected.shape[2:]
    count, width = int(np.prod(tokens)), int(np.prod(shape))
    reference, other = expected.reshape(count, width), got.reshape(count, width)
    gap, place = np.zeros(count), np.zeros(count, np.int64)
    values = np.zeros((2, count))
    at_once = max(1, BLOCK // max(width, 1))

    def share(rows_of_share: slice) -> tuple[float, int]:
        """Fills in some rows; the largest finite |expected| of theirs, and how many elements are not finite."""
        scale, nonfinite = 0.0, 0
        with np.errstate(all="ignore"):
            for start in range(rows_of_share.start, rows_of_share.stop, at_once):
                rows = slice(start, min(start + at_once, rows_of_share.stop))
                a, b = reference[rows], other[rows]
                apart = np.subtract(a, b, dtype=np.float64)
                np.abs(apart, out=apart)
                here, line = apart.argmax(1), np.arange(len(apart))
                if np.isfinite(apart[line, here]).all():  # then everything is: argmax finds what is not first
                    scale = max(scale, float(a.max()), -float(a.min()))
                else:
                    finite = np.isfinite(a) & np.isfinite(b)
                    nonfinite += int(finite.size - finite.sum())
                    apart = np.where(finite, apart, np.inf)
                    here = apart.argmax(1)
                    scale = max(scale, float(np.abs(np.where(finite, a, 0)).max()))
                place[rows], gap[rows] = here, apart[line, here]
                values[0, rows], values[1, rows] = a[line, here], b[line, here]
        return scale, nonfinite

    found = in_shares(share, count, width, at_once)
    scale, nonfinite = max(scale for scale, _ in found), sum(number for _, number in found)
    return Difference(gap.reshape(tokens), place.reshape(tokens), values[0].reshape(tokens),
                      values[1].reshape(tokens), scale, nonfinite, shape)


def last_rows(logits_BSV: np.ndarray, new_lengths_B: np.ndarray) -> np.ndarray:
    """Logits [B, V] of every row's last valid token; rows without one give their first row (to be ignored)."""
    if logits_BSV.shape[1] == 1:
        return logits_BSV[:, 0]
    return logits_BSV[np.arange(logits_BSV.shape[0]), np.maximum(new_lengths_B - 1, 0)]


def margin(reference_V: np.ndarray, other: int) -> float:
    """How much the reference prefers its own best token to token `other`: >= 0, 0 for a tie."""
    return float(reference_V.max() - reference_V[other])
