"""A cache of int8 codes in standard operators: QuantizeLinear before what writes it, DequantizeLinear behind.

New keys and values are quantized once, the codes are concatenated or scattered as they are, and attention reads what
they stand for, so new tokens are attended as they are stored. In calls of the canonical op, whose body computes in
fp32 whatever its cache holds, the scale of the keys becomes a factor of the scores, and that of the values one of the
output. Dimensions as in `gqa_export.attention_op`. Source: onnx docs/Operators.md, QuantizeLinear-23; the rule is
that of `gqa_export.quantized.kv_codes`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .. import attention_op
from ..graph import edit
from ..graph.node_builder import Nodes
from ..graph.passes import Pass, Rewritten
from ..spec import AttentionSpec, KvCache, KvScales
from .attention_calls import OP, PAST_KEY, PAST_VALUE, attention_calls
from .context import Context

CODES_IN_BODY = (8,)
"""bits of the codes that the body of the canonical op can read: one code a number"""
NEW = tuple(attention_op.input_index(name) for name in ("key", "value"))


def scales_of(kv: KvCache, layer: int) -> KvScales:
    """The two scales of a layer."""
    return next(scales for scales in kv.scales if scales.layer == layer)


def retype(kv: KvCache, layer: AttentionSpec, pasts: Sequence[gs.Tensor], presents: Sequence[gs.Tensor]) -> None:
    """Let a layer's cache tensors be codes. pasts, presents: key, value."""
    for tensors in (pasts, presents):
        for tensor, size in zip(tensors, (layer.head_size, layer.value_head_size), strict=True):
            tensor.dtype = np.dtype(kv.dtype)
            tensor.shape = [*tensor.shape[:3], kv.width(size)]


def quantized(node: Nodes, label: str, numbers: gs.Tensor, scale: float, element: int) -> gs.Tensor:
    """int8 codes of numbers of the type `element`, in any layout; computed in fp32, as the scale is."""
    # QuantizeLinear takes fp16 beside a scale of fp32, but ONNX Runtime 1.32 moves it and confuses the two types
    wide = numbers if element == onnx.TensorProto.FLOAT else node(f"{label}/wide", "Cast", numbers,
                                                                  to=onnx.TensorProto.FLOAT)
    return node(f"{label}/codes", "QuantizeLinear", wide, *_scale(node, label, scale))


def dequantized(node: Nodes, label: str, codes: gs.Tensor, scale: float, element: int) -> gs.Tensor:
    """What codes stand for, as numbers of the type `element`."""
    numbers = node(f"{label}/numbers", "DequantizeLinear", codes, *_scale(node, label, scale))
    return numbers if element == onnx.TensorProto.FLOAT else node(f"{label}/narrow", "Cast", numbers, to=element)


def _scale(node: Nodes, label: str, scale: float) -> list[gs.Tensor]:
    """A scale, and the zero point, which says that codes are int8."""
    return [edit.constant(f"{node.scope}/{label}/scale", np.array(scale, np.float32)),
            edit.constant(f"{node.scope}/{label}/zero_point", np.array(0, np.int8))]


def codes_in_calls(graph: gs.Graph, context: Context) -> Rewritten:
    """Let the calls of the canonical op that are left write and read codes."""
    kv = context.options.kv
    assert kv is not None
    calls = attention_calls(graph, context).found
    for call, layer in calls:
        scales = scales_of(kv, layer.layer)
        scope, _, name = call.name.rpartition("/")
        node = Nodes(graph, f"{scope}/{name}/cache")
        retype(kv, layer, (call.inputs[PAST_KEY], call.inputs[PAST_VALUE]), call.outputs[1:])
        for place, scale in zip(NEW, (scales.key, scales.value), strict=True):
            call.inputs[place] = quantized(node, attention_op.INPUT_NAMES[place], call.inputs[place], scale,
                                           context.element)
        call.attrs["scale"] = layer.scale * float(np.float32(scales.key))
        _scale_output(graph, node, call, scales.value, context.element)
    return Rewritten(len(calls))


def _scale_output(graph: gs.Graph, node: Nodes, call: gs.Node, scale: float, element: int) -> None:
    """Multiply what a call answers by the scale of its values, in fp32."""
    output = call.outputs[0]
    of_codes = gs.Variable(f"{node.scope}/of_codes", dtype=output.dtype, shape=output.shape)
    call.outputs[0] = of_codes
    factor = edit.constant(f"{node.scope}/value_scale", np.array(scale, np.float32))
    if element == onnx.TensorProto.FLOAT:
        scaled = node("output", "Mul", of_codes, factor)
    else:
        wide = node("output/scaled", "Mul", node("output/wide", "Cast", of_codes, to=onnx.TensorProto.FLOAT), factor)
        scaled = node("output", "Cast", wide, to=element)
    scaled.dtype, scaled.shape = output.dtype, output.shape
    edit.replace_uses(graph, output, scaled)


def calls_left(context: Context) -> int:
    """How many layers stay the canonical op."""
    return sum(context.target.attention == OP or bool(context.cannot_hold(layer)) for layer in context.spec.layers)


PASSES = (Pass("codes_in_calls", codes_in_calls, expect=calls_left),)
