"""How far a pooled layer is from its source: relative errors of keys, values and attention output, from weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .heads import LayerHeads
from .pooling import Pooled


@dataclass(frozen=True)
class LayerError:
    """Relative root-mean-square errors of one layer. output is None where the output projection is not known.

    basis "weights": for inputs whose features are independent and of equal size, each head's attention weights taken
    as they were; "activations": the layer's answer on a text, as the converted model gives it.
    """

    layer: int
    kv_heads: int
    key: float
    value: float
    output: float | None
    basis: str = "weights"


def weight_errors(heads: LayerHeads, pooled: Pooled) -> LayerError:
    """The errors of a pooled layer, as far as weights alone tell."""
    off, all_of = {"key": 0.0, "value": 0.0, "output": 0.0}, {"key": 0.0, "value": 0.0, "output": 0.0}
    known = heads.layout.output is not None
    new_query = 0
    for group, members in enumerate(pooled.groups):
        for head in members:
            key, value = heads.key(head), heads.value(head)
            off["key"] += _square(key - _mapped(pooled.key_maps, head, pooled.key[group]))
            off["value"] += _square(value - _mapped(pooled.value_maps, head, pooled.value[group]))
            all_of["key"] += _square(key)
            all_of["value"] += _square(value)
            for query in heads.queries_of(head) if known else ():
                old = heads.output(query)
                if pooled.output is not None:
                    size = value.shape[0]
                    new = pooled.output[:, new_query * size: (new_query + 1) * size]
                else:
                    new = old if pooled.value_maps is None else old @ pooled.value_maps[head]
                here, away = product_energy(old, value, new, pooled.value[group])
                all_of["output"] += here
                off["output"] += away
                new_query += 1
    ratio = {name: (max(off[name], 0.0) / all_of[name]) ** 0.5 if all_of[name] else 0.0 for name in off}
    return LayerError(heads.layout.layer, len(pooled.groups), ratio["key"], ratio["value"],
                      ratio["output"] if known else None)


def product_energy(old: torch.Tensor, value: torch.Tensor, new: torch.Tensor,
                   pooled: torch.Tensor) -> tuple[float, float]:
    """Squared sizes of old @ value [out, in] and of old @ value - new @ pooled, without forming either product."""
    left, right = torch.cat((old, -new), dim=1), torch.cat((value, pooled), dim=0)
    size = value.shape[0]
    energy = (left.T @ left) * (right @ right.T)
    whole = float(energy[:size, :size].sum())
    away = float(energy.sum())
    if away < 1e-12 * whole and new is old and torch.equal(value, pooled):
        away = 0.0
    return whole, away


def _square(values: torch.Tensor) -> float:
    return float((values * values).sum())


def _mapped(maps: torch.Tensor | None, head: int, pooled: torch.Tensor) -> torch.Tensor:
    return pooled if maps is None else maps[head] @ pooled


def knee(errors: dict[int, float]) -> int | None:
    """The number of key/value heads after which the error begins to rise steeply: the point farthest below the line
    from the most to the fewest heads, over log2 of their number. None with fewer than three points or no bend."""
    from math import log2

    points = sorted(errors.items(), reverse=True)
    if len(points) < 3:
        return None
    (most, low), (fewest, high) = points[0], points[-1]
    span = log2(most) - log2(fewest)
    below = {count: low + (high - low) * (log2(most) - log2(count)) / span - error for count, error in points[1:-1]}
    best = max(below, key=lambda count: below[count])
    return best if below[best] > 0.05 * max(high - low, 1e-12) else None
