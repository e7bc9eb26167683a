"""A pooled layer -> the tensors of the converted checkpoint: every head's rows put where the new model wants them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .heads import LayerHeads, output_of, put, put_output
from .layout import Heads, LayerLayout
from .pooling import Pooled


def assemble(heads: LayerHeads, target: LayerLayout, pooled: Pooled) -> dict[str, torch.Tensor]:
    """All parameters of the layer that change, by name, in the stored type. What does not change is not among them."""
    source = heads.layout
    names = [role.weight for role in (target.key, target.value)]
    tensors: dict[str, torch.Tensor] = {}
    roles = [target.key, target.value]
    if not pooled.in_place or target.query.weight in names:
        roles.append(target.query)
    for role in roles:
        if role.weight not in tensors:
            tensors.update(_blank(heads, source, target, role.weight, role))
    for group, (key, value) in enumerate(zip(pooled.key, pooled.value, strict=True)):
        put(target.key, tensors, group, key)
        put(target.value, tensors, group, value)
    if target.query.weight in tensors:
        _put_queries(heads, target, pooled, tensors)
    if pooled.order != tuple(range(len(pooled.order))) or pooled.value_maps is not None or pooled.output is not None:
        tensors.update(_outputs(heads, target, pooled))
    if source.sinks and pooled.order != tuple(range(len(pooled.order))):
        order = [query for head in pooled.order for query in heads.queries_of(head)]
        tensors[source.sinks] = heads.tensor(source.sinks)[order].clone()
    return tensors


def covered(layout: LayerLayout, weight: str) -> list[int]:
    """The rows of a weight that heads of queries, keys and values take."""
    taken: set[int] = set()
    for role in (layout.query, layout.key, layout.value):
        if role.weight == weight:
            taken.update(row for start in role.starts for row in range(start, start + role.size))
    return sorted(taken)


def _blank(heads: LayerHeads, source: LayerLayout, target: LayerLayout, weight: str,
           role: Heads) -> dict[str, torch.Tensor]:
    """Weight (and bias) of the new size; rows that belong to no head (a gate's) are copied in their order."""
    old = heads.tensor(weight)
    axis = 1 if role.transposed else 0
    rest = sorted(set(range(old.shape[axis])) - set(covered(source, weight)))
    count = len(covered(target, weight)) + len(rest)
    places = sorted(set(range(count)) - set(covered(target, weight)))
    made = {}
    for name, at in ((weight, axis), (role.bias, 0)):
        if name:
            tensor = heads.tensor(name)
            shape = list(tensor.shape)
            shape[at] = count
            made[name] = tensor.new_zeros(shape)
            if rest:
                made[name].index_copy_(at, torch.tensor(places), tensor.index_select(at, torch.tensor(rest)))
    return made


def _put_queries(heads: LayerHeads, target: LayerLayout, pooled: Pooled, tensors: dict[str, torch.Tensor]) -> None:
    new = 0
    for head in pooled.order:
        for query in heads.queries_of(head):
            rows = heads.query(query)
            put(target.query, tensors, new, rows if pooled.key_maps is None else pooled.key_maps[head].T @ rows)
            new += 1


def _outputs(heads: LayerHeads, target: LayerLayout, pooled: Pooled) -> dict[str, torch.Tensor]:
    into = output_of(target)
    tensors = {into.weight: heads.tensor(into.weight).clone()}
    size, new = into.size, 0
    for head in pooled.order:
        for query in heads.queries_of(head):
            if pooled.output is not None:
                columns = pooled.output[:, new * size: (new + 1) * size]
            else:
                columns = heads.output(query)
                columns = columns if pooled.value_maps is None else columns @ pooled.value_maps[head]
            put_output(into, tensors, new, columns)
            new += 1
    return tensors


def repeat(heads: LayerHeads, target: LayerLayout, order: Sequence[int]) -> dict[str, torch.Tensor]:
    """The layer with every key/value head repeated, and the copies (with their queries) in this order."""
    source = heads.layout
    tensors: dict[str, torch.Tensor] = {}
    for role in (target.query, target.key, target.value):
        if role.weight not in tensors:
            tensors.update(_blank(heads, source, target, role.weight, role))
    into = output_of(target)
    tensors[into.weight] = heads.tensor(into.weight).clone()
    copies, queries = len(order) // len(source.key.starts), len(source.query.starts) // len(order)
    moved = [copy * queries + i for copy in order for i in range(queries)]
    for new, copy in enumerate(order):
        put(target.key, tensors, new, heads.key(copy // copies))
        put(target.value, tensors, new, heads.value(copy // copies))
    for new, query in enumerate(moved):
        put(target.query, tensors, new, heads.query(query))
        put_output(into, tensors, new, heads.output(query))
    if source.sinks:
        tensors[source.sinks] = heads.tensor(source.sinks)[moved].clone()
    return tensors


def changed(source: LayerLayout, in_place: bool) -> set[str]:
    """Names of the parameters that a conversion of this layer may write."""
    roles = [source.key, source.value] if in_place else [source.query, source.key, source.value]
    names = {name for role in roles for name in (role.weight, role.bias)}
    if not in_place:
        names |= {source.output.weight if source.output else "", source.sinks}
    return names - {""}
