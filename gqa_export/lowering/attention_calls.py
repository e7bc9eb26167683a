"""The calls of the canonical op in a graph, each with the spec of its layer: the one way by which every target finds
them.

A call is found by the cache it reads, and held to the spec: whatever a dialect writes afterwards (a window in a mask,
an attribute, nothing at all) comes from the spec, so a call that disagrees with it is refused. Dimensions as in
`gqa_export.attention_op`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from .. import attention_op, graph_io
from ..errors import UnsupportedModel
from ..graph.match import const_value, is_op, is_weight
from ..graph.passes import NearMiss, Rewritten
from ..spec import AttentionSpec
from .context import Context

OP = f"{attention_op.DOMAIN}::{attention_op.OP}"
PAST_KEY, PAST_VALUE, SINKS = (attention_op.input_index(name) for name in ("past_key", "past_value", "sinks"))
COMPARED = {"num_heads": "num_heads", "kv_num_heads": "kv_num_heads", "scale": "scale", "softcap": "softcap",
            "window": "visible"}
"""attribute of a call -> what `AttentionSpec` calls it"""
RELATIVE = 1e-6
"""an attribute is an fp32 number, the spec has an fp64 one"""


class Call(NamedTuple):
    """A node that is the canonical op, and its layer."""

    node: gs.Node
    layer: AttentionSpec


class Calls(NamedTuple):
    """The calls of a graph in graph order, and what stands where a layer's call should be."""

    found: list[Call]
    near_misses: tuple[NearMiss, ...]


def attention_calls(graph: gs.Graph, context: Context) -> Calls:
    """Find the call of each layer.

    Raises:
        UnsupportedModel: the heads, scale, softcap, window or sinks of a call are not those of its layer.
    """
    readers, found, misses = graph_io.CacheReaders(context.spec), [], []
    for node in graph.nodes:
        if not is_op(node, attention_op.OP, attention_op.DOMAIN):
            continue
        past = node.inputs[PAST_KEY].name if len(node.inputs) > PAST_KEY else ""
        layer = readers.take(past)
        if layer is not None:
            found.append(Call(node, layer))
            _check(node, layer)
        else:
            misses.append(NearMiss(node.name, f"its past_key is {past!r}, which is not the key cache of a layer"))
    lost = [layer.cache for layer in context.spec.layers if all(call.layer is not layer for call in found)]
    return Calls(found, (*misses, *_in_place_of(graph, lost)))


def only_fallbacks_are_left(graph: gs.Graph, context: Context) -> list[NearMiss]:
    """The nodes that still are the canonical op and not of a layer that fell back: there must be none."""
    fallen = {fallback.layer for fallback in context.fallbacks}
    allowed = {layer.cache for layer in context.spec.layers if layer.layer in fallen or context.is_long(layer)}
    return [NearMiss(node.name, f"it still is {OP}") for node in graph.nodes
            if is_op(node, attention_op.OP, attention_op.DOMAIN) and node.outputs  # a removed node has none
            and graph_io.layer_of_cache(node.inputs[PAST_KEY].name) not in allowed]


def check_attention(graph: gs.Graph, context: Context) -> Rewritten:
    """Rewrite nothing; count the calls, each held to the spec of its layer."""
    calls = attention_calls(graph, context)
    return Rewritten(len(calls.found), calls.near_misses)


def has_sinks(node: gs.Node) -> bool | None:
    """Whether a call has attention sinks (-inf for every head is none); None where that is computed in the graph."""
    if len(node.inputs) <= SINKS or node.inputs[SINKS].is_empty():
        return False
    value = const_value(node.inputs[SINKS])
    if value is not None:
        return not bool(np.isneginf(value).all())
    return True if is_weight(node.inputs[SINKS]) else None


def _check(node: gs.Node, layer: AttentionSpec) -> None:
    wrong = [f"{name} is {node.attrs.get(name)}, expected {getattr(layer, fact):g}" for name, fact in COMPARED.items()
             if not _same(node.attrs.get(name), getattr(layer, fact))]
    past_value = graph_io.past_names(layer.cache)[1]
    if node.inputs[PAST_VALUE].name != past_value:
        wrong.append(f"past_value is {node.inputs[PAST_VALUE].name!r}, expected {past_value!r}")
    for place, name, size in ((PAST_KEY, "head_size", layer.head_size),
                              (PAST_VALUE, "value_head_size", layer.value_head_size)):
        shape = node.inputs[place].shape
        if shape and isinstance(shape[-1], int) and shape[-1] != size:
            wrong.append(f"{name} is {shape[-1]}, expected {size}")
    if has_sinks(node) not in (layer.sinks, None):
        wrong.append("it has sinks, expected none" if has_sinks(node) else "it has no sinks, expected some")
    if wrong:
        raise UnsupportedModel(f"an attention node disagrees with layer {layer.layer} of the model: {'; '.join(wrong)}",
                               f"node {node.name!r}", "this is a fault of gqa-export: please report the model it was "
                               "exported from", code="E-GRAPH-LAYER-FACTS")


def _same(found: object, expected: float) -> bool:
    return isinstance(found, (int, float)) and math.isclose(found, expected, rel_tol=RELATIVE, abs_tol=1e-9)


def _in_place_of(graph: gs.Graph, numbers: Iterable[int]) -> list[NearMiss]:
    """Of layers without a call: the node of another op that reads their cache."""
    readers = {tensor.name: node for node in graph.nodes for tensor in node.inputs}
    misses = []
    for number in numbers:
        name = graph_io.past_names(number)[0]
        node = readers.get(name)
        if node is None:
            misses.append(NearMiss(name, f"this input of layer {number} is not read"))
        elif not is_op(node, attention_op.OP, attention_op.DOMAIN):
            op = f"{node.domain}::{node.op}" if node.domain else node.op
            misses.append(NearMiss(node.name, f"it reads the cache of layer {number} and is {op}, expected {OP}"))
    return misses
