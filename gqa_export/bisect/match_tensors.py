"""Which tensor of the graph is which point of PyTorch's: found by value, one layer teaching the others.

No table of names: a point that some layer's graph shows (whole, or as columns of a joined matrix product) is looked
for under the same name in every layer. A point that no layer shows was fused away.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from ..compare.tolerance import tolerance


@dataclass(frozen=True)
class Place:
    """A tensor by its name relative to its layer, and the first of its columns that belong to the point."""

    name: str
    column: int


def relative(name: str, prefix: str, layer: int) -> str:
    """`model.layers.2.mlp/x` of layer 1 -> `model.layers.+1.mlp/x`."""
    return re.sub(rf"{re.escape(prefix)}\.(\d+)", lambda m: f"{prefix}.{int(m[1]) - layer:+d}", name)


def flat(values: np.ndarray, tokens: int) -> np.ndarray | None:
    """[S, W] of what is [S, W], [S, H, D] or [H, S, D]; None for another shape."""
    if values.ndim == 2 and values.shape[0] == tokens:
        return values
    if values.ndim == 3 and values.shape[0] == tokens:
        return values.reshape(tokens, -1)
    if values.ndim == 3 and values.shape[1] == tokens:
        return values.swapaxes(0, 1).reshape(tokens, -1)
    return None


def bound_of(expected: np.ndarray) -> float:
    """What rounding in fp32 explains for a point with values like these."""
    return tolerance(None, float(np.abs(expected).max(initial=0.0)), "float32").bound


def find(expected_SW: np.ndarray, tensors: dict[str, np.ndarray]) -> list[Place]:
    """Every place whose values are the expected ones. tensors: of one row, [S, W] or with heads apart."""
    found, (tokens, width), bound = [], expected_SW.shape, bound_of(expected_SW)
    for name, values in tensors.items():
        rows = flat(values, tokens)
        if rows is None or rows.shape[1] < width:
            continue
        starts = np.arange(rows.shape[1] - width + 1)
        near = np.abs(rows[:, starts] - expected_SW[:, :1]).max(0) <= bound
        found += [Place(name, int(start)) for start in starts[near]
                  if np.abs(rows[:, start: start + width] - expected_SW).max() <= bound]
    return found


def agreed(found: list[list[Place]]) -> Place | None:
    """The place that most layers share. found: per layer, names relative."""
    votes = Counter(place for places in found for place in places)
    return max(votes, key=lambda place: (votes[place], -len(place.name))) if votes else None


def columns(tensors: dict[str, np.ndarray], place: Place, tokens: int, width: int) -> np.ndarray | None:
    """[S, width] at a place; None where the graph has no such tensor."""
    rows = flat(tensors[place.name], tokens) if place.name in tensors else None
    return None if rows is None else rows[:, place.column: place.column + width]
