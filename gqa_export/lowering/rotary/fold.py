"""Rotary into the attention op: what the op then reads, and the tables it rotates by. For targets whose op rotates.

Dimensions as in `gqa_export.attention_op`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ... import attention_op, graph_io
from ...errors import GqaExportError
from ...graph import edit
from ...graph.match import is_op
from .. import head_axes
from ..context import Context
from .find import Finder, position_ids
from .verify import Rotation

QUERY, KEY, PAST_KEY, PAST_LENGTHS = (
    attention_op.input_index(name) for name in ("query", "key", "past_key", "past_lengths"))


def calls(graph: gs.Graph) -> list[gs.Node]:
    """The nodes that are still the canonical op."""
    return [node for node in graph.nodes if is_op(node, attention_op.OP, attention_op.DOMAIN)]


def layer_of(node: gs.Node, context: Context) -> Any:
    """The spec of the layer whose past a canonical node reads."""
    for layer in context.spec.layers:
        if node.inputs[PAST_KEY].name == graph_io.past_names(layer.layer)[0]:
            return layer
    raise GqaExportError("an attention node reads no layer's past", f"node {node.name!r}",
                         "pass a canonical model made by this version of gqa-export")


def fold_rotary(graph: gs.Graph, context: Context) -> int:
    """Find each layer's rotation and, where the op can do it, let the op read what comes before it; counts layers.

    `rotations` keeps the rotation of each such layer, `remarks` says why another one stays outside.
    """
    nodes = calls(graph)
    finder = Finder(graph, position_ids([node.inputs[PAST_LENGTHS] for node in nodes]), context.options.capacity)
    rotations: dict[int, Rotation] = context.rotations
    outside = 0
    for node in nodes:
        layer = layer_of(node, context)
        query = finder.find(node.inputs[QUERY], layer.num_heads, layer.head_size)
        key = finder.find(node.inputs[KEY], layer.kv_num_heads, layer.head_size)
        why = "" if query is None and key is None else _why_outside(query, key, layer, context)
        if why:
            outside += 1
            context.remarks.append(f"layer {layer.layer}: rotary stays outside attention: {why}")
        elif isinstance(query, tuple) and isinstance(key, tuple):
            rotations[layer.layer] = query[1]
            for place, (region, rotation), heads in ((QUERY, query, layer.num_heads), (KEY, key, layer.kv_num_heads)):
                node.inputs[place] = head_axes.flat(graph, region.source, rotation.layout, heads * layer.head_size,
                                                     f"{node.name}.{attention_op.INPUT_NAMES[place]}")
    context.counts["rotary_outside"] = outside
    edit.tidy(graph)
    return len(rotations)


def _why_outside(query: Any, key: Any, layer: Any, context: Context) -> str:
    for found, which in ((query, "query"), (key, "key")):
        if not isinstance(found, tuple):
            return f"{which}: {found or 'is not rotated'}"
    reason = context.target.cannot_hold(layer)
    if reason:
        return reason
    (_, turned), (_, other) = query, key
    if not turned.same_table(other):
        return "queries and keys are rotated differently"
    if not context.target.rotates(layer.head_size, turned.size):
        target = context.target
        return (f"{target.attention} rotates heads divisible by {target.rotary_head_multiple} with R/2 divisible by "
                f"{target.rotary_half_multiple}, here D = {layer.head_size}, R = {turned.size}")
    return ""


def tables(graph: gs.Graph, rotation: Rotation, element: int, known: dict[bytes, tuple[gs.Tensor, gs.Tensor]]):
    """The tables of a rotation in the model's type, each stored once.

    Stored in fp32 and cast in the graph (runtimes fold it), so that the fp32 twin of a bf16 model is not rounded here.
    """
    key = rotation.cos.tobytes() + rotation.sin.tobytes()
    if key not in known:
        number = len(known)
        tables = [edit.constant(f"rotary/{name}_{number}", np.asarray(value, np.float32))
                  for name, value in (("cos", rotation.cos), ("sin", rotation.sin))]
        if element != onnx.TensorProto.FLOAT:
            tables = [edit.add_node(graph, "Cast", [table], name=f"{table.name}/Cast", attrs={"to": element})[0]
                      for table in tables]
        known[key] = (tables[0], tables[1])
    return known[key]
