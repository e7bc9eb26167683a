"""Rotary into the attention op: what the op then reads, and the tables it rotates by. For targets whose op rotates.

Dimensions as in `gqa_export.attention_op`.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ... import attention_op
from ...graph import edit
from ...graph.passes import NearMiss, Rewritten
from ...spec import AttentionSpec
from .. import head_axes
from ..attention_calls import attention_calls
from ..context import Context
from .find import Finder, position_ids
from .verify import Region, Rotation

Found = tuple[Region, Rotation] | str | None
"""what a `Finder` gives"""

TWO_TABLES = "each sequence chooses one of longrope's two tables by its length, and the op holds one for all"

QUERY, KEY, PAST_LENGTHS = (attention_op.input_index(name) for name in ("query", "key", "past_lengths"))


def fold_rotary(graph: gs.Graph, context: Context) -> Rewritten:
    """Find each layer's rotation and, where the op can do it, let the op read what comes before it; counts layers.

    `rotations` keeps the rotation of each such layer, `remarks` why another one stays outside.
    """
    calls = attention_calls(graph, context).found
    finder = Finder(graph, position_ids([node.inputs[PAST_LENGTHS] for node, _ in calls]), context.options.capacity)
    rotations: dict[int, Rotation] = context.rotations
    outside = []
    for node, layer in calls:
        query = finder.find(node.inputs[QUERY], layer.num_heads, layer.head_size)
        key = finder.find(node.inputs[KEY], layer.kv_num_heads, layer.head_size)
        why = _why_outside(query, key, layer, context)
        if why:
            outside.append(NearMiss(node.name, f"rotary stays outside attention: {why}"))
            context.remarks.append((layer.layer, f"rotary stays outside attention: {why}"))
        elif isinstance(query, tuple) and isinstance(key, tuple):
            rotations[layer.layer] = query[1]
            for place, (region, rotation), heads in ((QUERY, query, layer.num_heads), (KEY, key, layer.kv_num_heads)):
                node.inputs[place] = head_axes.flat(graph, region.source, rotation.layout, heads * layer.head_size,
                                                     f"{node.name}.{attention_op.INPUT_NAMES[place]}")
    context.log.counts["rotary_outside"] = len(outside)
    edit.tidy(graph)
    return Rewritten(len(rotations), tuple(outside))


def _why_outside(query: Found, key: Found, layer: AttentionSpec, context: Context) -> str:
    if query is None and key is None:
        return TWO_TABLES if context.spec.rope_switch else ""
    if not isinstance(query, tuple):
        return f"query: {query or 'is not rotated'}"
    if not isinstance(key, tuple):
        return f"key: {key or 'is not rotated'}"
    reasons = context.cannot_hold(layer)
    if reasons:
        return "; ".join(reasons)
    (_, turned), (_, other) = query, key
    if not turned.same_table(other):
        return "queries and keys are rotated differently"
    if not context.target.rotates(layer.head_size, turned.size):
        target = context.target
        return (f"{target.attention} rotates heads divisible by {target.rotary_head_multiple} with R/2 divisible by "
                f"{target.rotary_half_multiple}, here D = {layer.head_size}, R = {turned.size}")
    return ""


def tables(graph: gs.Graph, rotation: Rotation, element: int,
           known: dict[bytes, tuple[gs.Tensor, gs.Tensor]]) -> tuple[gs.Tensor, gs.Tensor]:
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
