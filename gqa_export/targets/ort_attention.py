"""Canonical op -> com.microsoft::GroupQueryAttention. Dimensions as in `gqa_export.contract`.

Source: onnxruntime docs/ContribOperators.md. seqlens_k is past + new - 1 per sequence, total_sequence_length the
length of the longest; a window counts the current token, -1 is none; the op writes token t of a sequence at t in
both cache modes and rotates by the same lengths, so rotary tables need no position ids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .. import cache_io, contract
from ..errors import GqaExportError
from ..graph import edit
from ..graph.match import const_value, is_op, only_input
from . import ort_layout
from .rotary import Finder, position_ids
from .rotary_probe import Rotation

DOMAIN = "com.microsoft"
OP = "GroupQueryAttention"
QUERY, KEY, VALUE, PAST_KEY, PAST_VALUE, PAST_LENGTHS, SINKS = (
    contract.input_index(name) for name in ("query", "key", "value", "past_key", "past_value", "past_lengths", "sinks"))


def calls(graph: gs.Graph) -> list[gs.Node]:
    """The nodes that are still the canonical op."""
    return [node for node in graph.nodes if is_op(node, contract.OP, contract.DOMAIN)]


def layer_of(node: gs.Node, context: Any) -> Any:
    """The spec of the layer whose past a canonical node reads."""
    for layer in context.spec.layers:
        if node.inputs[PAST_KEY].name == cache_io.past_names(layer.layer)[0]:
            return layer
    raise GqaExportError("an attention node reads no layer's past", f"node {node.name!r}",
                         "pass a canonical model made by this version of gqa-export")


def holdable(context: Any) -> int:
    """How many layers the target's attention op can hold."""
    return sum(not context.target.cannot_hold(layer) for layer in context.spec.layers)


def fold_rotary(graph: gs.Graph, context: Any) -> int:
    """Find each layer's rotation and, where the op can do it, let the op read what comes before it; counts layers.

    `notes["rotation"]` keeps the rotation of each such layer, `remarks` says why another one stays outside.
    """
    nodes = calls(graph)
    finder = Finder(graph, position_ids([node.inputs[PAST_LENGTHS] for node in nodes]), context.options.capacity)
    rotations: dict[int, Rotation] = context.notes.setdefault("rotation", {})
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
                node.inputs[place] = ort_layout.flat(graph, region.source, rotation.layout, heads * layer.head_size,
                                                     f"{node.name}.{contract.INPUT_NAMES[place]}")
    context.counts["rotary_outside"] = outside
    edit.tidy(graph)
    return len(rotations)


def _why_outside(query: Any, key: Any, layer: Any, context: Any) -> str:
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


def lower_attention(graph: gs.Graph, context: Any) -> int:
    """Rewrite every layer the op can hold; the others stay the canonical op and are recorded as fallbacks."""
    count = 0
    lengths: list[gs.Tensor] = []
    tables: dict[bytes, tuple[gs.Tensor, gs.Tensor]] = {}
    for node in calls(graph):
        layer = layer_of(node, context)
        reason = context.target.cannot_hold(layer)
        if reason:
            context.fall_back(layer.layer, reason)
            continue
        lengths = lengths or _lengths(graph)
        rotation = context.notes.get("rotation", {}).get(layer.layer)
        cos, sin = _tables(graph, rotation, context.notes["element"], tables) if rotation else (None, None)
        sinks = const_value(node.inputs[SINKS])
        head_sink = None if sinks is not None and np.isneginf(sinks).all() else node.inputs[SINKS]
        attrs = {"num_heads": layer.num_heads, "kv_num_heads": layer.kv_num_heads, "scale": float(node.attrs["scale"]),
                 "softcap": float(node.attrs["softcap"]), "local_window_size": int(node.attrs["window"]) or -1,
                 "do_rotary": int(rotation is not None),
                 "rotary_interleaved": int(rotation is not None and rotation.interleaved)}
        inputs, outputs = list(node.inputs), list(node.outputs)
        edit.remove(node)
        edit.add_node(graph, OP, [*inputs[QUERY:PAST_VALUE + 1], *lengths, cos, sin, None, None, head_sink],
                      name=f"{node.name.rpartition('/')[0]}/{OP}_0", domain=DOMAIN, outputs=outputs, attrs=attrs)
        count += 1
    return count


def _lengths(graph: gs.Graph) -> list[gs.Tensor]:
    """seqlens_k int32 [B] and total_sequence_length int32 [1], from attention_mask [B, T]."""
    mask = only_input(graph, cache_io.ATTENTION_MASK)
    axis, one = (edit.constant(f"lengths/{name}", np.array([1], np.int64)) for name in ("axis", "one"))
    to_int32 = {"to": onnx.TensorProto.INT32}
    total_B = edit.add_node(graph, "ReduceSum", [mask, axis], name="lengths/ReduceSum_0", attrs={"keepdims": 0})
    last_B = edit.add_node(graph, "Sub", [*total_B, one], name="lengths/Sub_0")
    seqlens_B = edit.add_node(graph, "Cast", last_B, name="lengths/Cast_0", attrs=to_int32)
    width = edit.add_node(graph, "Shape", [mask], name="lengths/Shape_0", attrs={"start": 1, "end": 2})
    return seqlens_B + edit.add_node(graph, "Cast", width, name="lengths/Cast_1", attrs=to_int32)


def _tables(graph: gs.Graph, rotation: Rotation, element: int, known: dict[bytes, tuple[gs.Tensor, gs.Tensor]]):
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
