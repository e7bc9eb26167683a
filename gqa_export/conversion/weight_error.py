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
    """The errors of a pooled layer, as far as weights alone tell; of the output not where it was fitted as a whole."""
    off, all_of = {"key": 0.0, "value": 0.0, "output": 0.0}, {"key": 0.0, "value": 0.0, "output": 0.0}
    known = heads.layout.output is not None and pooled.output is None
    for group, members in enumerate(pooled.groups):
        for head in members:
            key, value = heads.key(head), heads.value(head)
            away = value - _mapped(pooled.value_maps, head, pooled.value[group])
            off["key"] += _square(key - _mapped(pooled.key_maps, head, pooled.key[group]))
            off["value"] += _square(away)
            all_of["key"] += _square(key)
            all_of["value"] += float(heads.value_gram(head).trace())
            if known:  # the square of O_h (V_i - B_i V'), summed over the queries h of head i
                gram = heads.output_gram(head)
                off["output"] += float((gram * (away @ away.T)).sum())
                all_of["output"] += float((gram * heads.value_gram(head)).sum())
    ratio = {name: (max(off[name], 0.0) / all_of[name]) ** 0.5 if all_of[name] else 0.0 for name in off}
    return LayerError(heads.layout.layer, len(pooled.groups), ratio["key"], ratio["value"],
                      ratio["output"] if known else None)


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
