"""Canonical op -> com.microsoft::GroupQueryAttention. Dimensions as in `gqa_export.attention_op`.

Source: onnxruntime docs/ContribOperators.md. seqlens_k is past + new - 1 per sequence, total_sequence_length the
length of the longest; a window counts the current token, -1 is none; the op writes token t of a sequence at t in
both cache modes and rotates by the same lengths, so rotary tables need no position ids.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ... import attention_op, graph_io
from ...graph import edit
from ...graph.match import only_input
from ...graph.node_builder import Nodes
from ...graph.passes import Rewritten
from ...spec import KvCache
from ..attention_calls import SINKS, attention_calls, has_sinks
from ..context import Context
from ..kv_codes import retype, scales_of
from ..rotary.fold import tables

DOMAIN = "com.microsoft"
OP = "GroupQueryAttention"
QUERY, PAST_VALUE = (attention_op.input_index(name) for name in ("query", "past_value"))


def holdable(context: Context) -> int:
    """How many layers become the target's attention op."""
    return sum(not context.cannot_hold(layer) for layer in context.spec.layers)


def lower_attention(graph: gs.Graph, context: Context) -> Rewritten:
    """Rewrite every layer the op can hold; the others stay the canonical op and are recorded as fallbacks."""
    count = 0
    lengths: list[gs.Tensor] = []
    known: dict[bytes, tuple[gs.Tensor, gs.Tensor]] = {}
    calls, misses = attention_calls(graph, context)
    presents: dict[int, list[gs.Tensor]] = {}
    nothing: dict[int, gs.Tensor] = {}
    for node, layer in calls:
        if layer.owner is None:
            presents[layer.layer] = list(node.outputs[1:])
        if context.fall_back(layer):
            continue
        lengths = lengths or _lengths(graph)
        rotation = context.rotations.get(layer.layer)
        cos, sin = tables(graph, rotation, context.element, known) if rotation else (None, None)
        head_sink = None if has_sinks(node) is False else node.inputs[SINKS]
        attrs: dict[str, float | str] = {
            "num_heads": layer.num_heads, "kv_num_heads": layer.kv_num_heads, "scale": float(layer.scale),
            "softcap": float(layer.softcap), "local_window_size": layer.window or -1,
            "do_rotary": int(rotation is not None),
            "rotary_interleaved": int(rotation is not None and rotation.interleaved)}
        inputs, outputs = list(node.inputs), list(node.outputs)
        scales = []
        if context.options.kv is not None:
            retype(context.options.kv, layer, inputs[PAST_VALUE - 1:PAST_VALUE + 1], outputs[1:])
            scales = _code_scales(context.options.kv, layer.layer)
            attrs |= {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR",
                      "kv_cache_bit_width": context.options.kv.bits}
        if layer.owner is not None and context.options.reads_caches:
            width = layer.kv_num_heads * layer.head_size
            none = nothing.get(width) or nothing.setdefault(width, _no_tokens(graph, width, context.element))
            inputs[QUERY + 1:PAST_VALUE + 1] = [none, none, *presents[layer.owner]]
            outputs = outputs[:1]
        edit.remove(node)
        edit.add_node(graph, OP, [*inputs[QUERY:PAST_VALUE + 1], *lengths, cos, sin, None, None, head_sink,
                                 *scales],
                      name=f"{node.name.rpartition('/')[0]}/{OP}_0", domain=DOMAIN, outputs=outputs, attrs=attrs)
        count += 1
    return Rewritten(count, misses)


def _no_tokens(graph: gs.Graph, width: int, element: int) -> gs.Tensor:
    """Keys, or values, of no token [B, 0, K * D]: what a layer adds that reads another's cache."""
    node = Nodes(graph, f"no_tokens_{width}")
    batch = node("batch", "Shape", only_input(graph, graph_io.INPUT_IDS), start=0, end=1)
    one = edit.constant(f"{node.scope}/row", np.zeros((1, 0, width)), element)
    return node("rows", "Expand", one, node("shape", "Concat", batch, [0, width], axis=0))


def _code_scales(kv: KvCache, layer: int) -> list[gs.Tensor]:
    """The two scales of a layer's codes, as the op takes them."""
    scales = scales_of(kv, layer)
    return [edit.constant(f"layer.{layer}/{name}_scale", np.array([scale], np.float32))
            for name, scale in (("key", scales.key), ("value", scales.value))]


def _lengths(graph: gs.Graph) -> list[gs.Tensor]:
    """seqlens_k int32 [B] and total_sequence_length int32 [1], from attention_mask [B, T]."""
    mask = only_input(graph, graph_io.ATTENTION_MASK)
    axis, one = (edit.constant(f"lengths/{name}", np.array([1], np.int64)) for name in ("axis", "one"))
    to_int32 = {"to": onnx.TensorProto.INT32}
    total_B = edit.add_node(graph, "ReduceSum", [mask, axis], name="lengths/ReduceSum_0", attrs={"keepdims": 0})
    last_B = edit.add_node(graph, "Sub", [*total_B, one], name="lengths/Sub_0")
    seqlens_B = edit.add_node(graph, "Cast", last_B, name="lengths/Cast_0", attrs=to_int32)
    width = edit.add_node(graph, "Shape", [mask], name="lengths/Shape_0", attrs={"start": 1, "end": 2})
    return seqlens_B + edit.add_node(graph, "Cast", width, name="lengths/Cast_1", attrs=to_int32)
