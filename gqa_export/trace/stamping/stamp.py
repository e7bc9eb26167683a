"""Trace two layers of each kind, prove them isomorphic, stamp the rest: export time independent of depth.

Works on a simplified onnx_ir graph whose weights are detached and in which no common subexpressions were merged.
A layer's nodes are those whose module scope lies inside it. Two layers of one kind must agree node by node: same
ops, attributes and constants, parameters equal after renaming the layer, the same shared values; the one input pair
left over is the carried value (the residual stream). Anything else is `NotIsomorphic`, and the caller traces fully.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from ... import graph_io
from ..capture.canonical import scope_of
from .layer_kinds import Stack


class NotIsomorphic(Exception):
    """The traced layers of a kind differ, so depth cannot be stamped. The message says where."""


@dataclass
class _Layer:
    index: int
    nodes: list[ir.Node] = field(default_factory=list)
    carried: ir.Value | None = None
    out: ir.Value | None = None


def stamp(model: ir.Model, stack: Stack, prefix: str) -> None:
    """Replace the traced layers by all of them, in place. `prefix`: what the wrapper adds to weight names."""
    graph = model.graph
    layers = _split(graph, stack)
    _find_carried(graph, layers)
    for kind in sorted(set(stack.kinds)):
        same = [layers[i] for i in stack.traced if stack.kinds[i] == kind]
        for other in same[1:]:
            _prove(same[0], other, stack, prefix)
    presents = {value.name: value for value in graph.outputs}
    inputs = {value.name: value for value in graph.inputs}
    last_traced = layers[stack.traced[-1]]
    after_last = [(use.node, use.idx) for use in last_traced.out.uses()  # type: ignore[union-attr]
                  if use.node not in set(last_traced.nodes)]
    carried = layers[stack.traced[0]].carried  # None if layer 0 is the only one of its kind: it stays as it is
    for index in range(len(stack.kinds)):
        template = layers[stack.template(index)]
        if index != template.index:
            carried = _clone(graph, template, index, stack, prefix, carried, inputs, presents)
            continue
        for node in template.nodes if carried is not None else ():
            _redirect(node, template.carried, carried)
        template.carried, carried = carried, template.out
    assert carried is not None
    for node, place in after_last:
        node.replace_input_with(place, carried)
    answers = [value for value in graph.outputs if value.name in (graph_io.LOGITS, graph_io.HIDDEN_STATES)]
    graph.outputs[:] = [*answers, *[presents[name] for name in _in_order(presents, *(each.name for each in answers))]]
    weights = [value for name, value in inputs.items() if not name.startswith("past_key_values.")]  # type: ignore
    pasts = [inputs[name] for name in _in_order(inputs, *(value.name for value in weights))]
    head = len([value for value in graph.inputs if value.name in (
        graph_io.INPUT_IDS, graph_io.ATTENTION_MASK, graph_io.PAST_LENGTHS, graph_io.NEW_LENGTHS)])
    graph.inputs[:] = [*weights[:head], *pasts, *weights[head:]]
    graph.sort()


def _split(graph: ir.Graph, stack: Stack) -> dict[int, _Layer]:
    pattern = re.compile(re.escape(stack.path) + r"\.(\d+)(\.|$)")
    layers = {index: _Layer(index) for index in stack.traced}
    owner: dict[ir.Node, int] = {}
    for node in graph:
        match = pattern.match(scope_of(node))
        index = int(match.group(1)) if match else None
        if index is None and not node.metadata_props.get("pkg.torch.onnx.name_scopes"):
            # Rewritten nodes lose their metadata: they belong where their producers do.
            owners = {owner[p] for p in _producers(node) if p in owner}
            index = max(owners) if owners else None
        if index is not None:
            if index not in layers:
                raise NotIsomorphic(f"a node of layer {index}, which was not traced: {node.op_type}")
            layers[index].nodes.append(node)
            owner[node] = index
    return layers


def _producers(node: ir.Node) -> Iterable[ir.Node]:
    return [p for value in node.inputs if value is not None and (p := value.producer()) is not None]


def _find_carried(graph: ir.Graph, layers: dict[int, _Layer]) -> None:
    """Each layer's one output to the rest of the graph (presents aside), which is the next layer's carried value."""
    outputs = {id(value) for value in graph.outputs}
    order = sorted(layers)
    for index in order:
        inside = set(layers[index].nodes)
        leaving = [value for node in layers[index].nodes for value in node.outputs
                   if id(value) not in outputs and any(use.node not in inside for use in value.uses())]
        if len(leaving) != 1:
            raise NotIsomorphic(f"layer {index} hands on {len(leaving)} values, not one")
        layers[index].out = leaving[0]
    for before, after in itertools.pairwise(order):
        layers[after].carried = layers[before].out


def _prove(first: _Layer, second: _Layer, stack: Stack, prefix: str) -> None:
    if len(first.nodes) != len(second.nodes):
        raise NotIsomorphic(f"layers {first.index} and {second.index} have {len(first.nodes)} and "
                            f"{len(second.nodes)} nodes")
    twin: dict[int, ir.Value] = {}
    for a, b in zip(first.nodes, second.nodes):
        where = f"layers {first.index} and {second.index}, {scope_of(b)}/{b.op_type}"
        if (a.domain, a.op_type, len(a.inputs), len(a.outputs)) != (b.domain, b.op_type, len(b.inputs),
                                                                     len(b.outputs)):
            raise NotIsomorphic(f"{where}: {a.op_type} against {b.op_type}")
        if _attributes(a) != _attributes(b):
            raise NotIsomorphic(f"{where}: attributes differ")
        for x, y in zip(a.inputs, b.inputs):
            _match_inputs(x, y, first, second, stack, prefix, twin, where)
        for x, y in zip(a.outputs, b.outputs):
            twin[id(x)] = y
    if first.carried is None or twin.get(id(first.out)) is not second.out:
        raise NotIsomorphic(f"layers {first.index} and {second.index} hand on different values")


def _match_inputs(x: ir.Value | None, y: ir.Value | None, first: _Layer, second: _Layer, stack: Stack, prefix: str,
                  twin: dict[int, ir.Value], where: str) -> None:
    if x is None or y is None:
        if x is not y:
            raise NotIsomorphic(f"{where}: an optional input is there only once")
        return
    if id(x) in twin:
        if twin[id(x)] is not y:
            raise NotIsomorphic(f"{where}: reads another value of its layer")
        return
    if y is second.carried:
        if first.carried is None:
            first.carried = x  # the first layer's residual stream starts where its twin's enters
        if first.carried is not x:
            raise NotIsomorphic(f"{where}: a second carried value")
        return
    if x is y:
        return
    if x.name is not None and y.name == _renamed(x.name, first.index, second.index, stack, prefix):
        return
    if _constant(x) is not None and _constant(x) == _constant(y):
        return
    raise NotIsomorphic(f"{where}: inputs {x.name} and {y.name} do not correspond")


def _attributes(node: ir.Node) -> dict[str, str]:
    return {name: repr(attribute.value) for name, attribute in node.attributes.items()}


def _constant(value: ir.Value) -> tuple[Any, ...] | None:
    if value.const_value is None:
        return None
    array = value.const_value.numpy()
    return array.dtype.str, array.shape, array.tobytes()


def _renamed(name: str, old: int, new: int, stack: Stack, prefix: str) -> str:
    """A weight's or cache input's name in another layer."""
    layers = f"{prefix}{stack.path}."
    if name.startswith(f"{layers}{old}."):
        return f"{layers}{new}." + name.removeprefix(f"{layers}{old}.")
    return graph_io.in_layer(name, old, new)


def _in_order(values: Iterable[str | None], *others: str | None) -> list[str]:
    """The names of caches and states among `values`, in the order of the graph: keys and values layer by layer, then
    states."""
    names = [name for name in values if name is not None and name not in others]
    return sorted(names, key=graph_io.place_of_cache)


def _redirect(node: ir.Node, old: ir.Value | None, new: ir.Value | None) -> None:
    for place, value in enumerate(node.inputs):
        if value is not None and value is old:
            node.replace_input_with(place, new)


def _clone(graph: ir.Graph, template: _Layer, index: int, stack: Stack, prefix: str, carried: ir.Value | None,
           inputs: dict[str | None, ir.Value], presents: dict[str | None, ir.Value]) -> ir.Value:
    """Append a copy of a layer and return what it hands on. New weights and cache inputs are added to `inputs`."""
    assert carried is not None
    assert template.carried is not None
    copies: dict[int, ir.Value] = {id(template.carried): carried}
    old_scope, new_scope = f"{stack.path}.{template.index}", f"{stack.path}.{index}"
    edge = re.compile(re.escape(old_scope) + r"(?!\d)")

    def mapped(value: ir.Value | None) -> ir.Value | None:
        if value is None or id(value) in copies:
            return None if value is None else copies[id(value)]
        name = _renamed(value.name or "", template.index, index, stack, prefix)
        if name == value.name:
            return value  # shared by all layers, or a constant
        if name not in inputs:
            inputs[name] = ir.Value(name=name, type=value.type, shape=value.shape)
        return inputs[name]

    for node in template.nodes:
        twin = ir.Node(node.domain, node.op_type, [mapped(value) for value in node.inputs],
                       list(node.attributes.values()), num_outputs=len(node.outputs), version=node.version)
        twin.metadata_props.update({key: edge.sub(new_scope, text) for key, text in node.metadata_props.items()
                                    if key == "pkg.torch.onnx.name_scopes"})
        for old, new in zip(node.outputs, twin.outputs):
            new.type, new.shape = old.type, old.shape
            copies[id(old)] = new
            name = _renamed(old.name or "", template.index, index, stack, prefix)
            if old.name in presents and name != old.name:
                new.name = name
                presents[name] = new
        graph.append(twin)
    return copies[id(template.out)]
