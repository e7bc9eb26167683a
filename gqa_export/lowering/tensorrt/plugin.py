"""Target `trt-plugin`: every attention layer one node of the grouped-attention plugin of TensorRT and TensorRT-RTX.

The node has the inputs that are present, in the order of the contract, and no holes among them, which TensorRT
refuses; `has_new`, `has_rotary` and `has_sinks` say which those are. Rotary goes into the op where it is one that
the op can do. The rest of the graph stays standard ops as traced: TensorRT fuses those itself.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ... import attention_op
from ...graph.match import is_op
from ...graph.passes import NearMiss, Pass, Rewritten
from .. import head_axes
from ..attention_calls import attention_calls, has_sinks
from ..context import Context
from ..rotary.fold import fold_rotary, tables
from .common import FIRST, PREPARE  # noqa: F401 PREPARE is this target's too

PLUGIN_VERSION = str(attention_op.VERSION)
PLUGIN_NAMESPACE = attention_op.DOMAIN
PRESENCE = {"has_new": "key", "has_rotary": "cos", "has_sinks": "sinks"}
"""int attributes of the node: whether that input (and its pair) is among its inputs"""


def lower_attention(graph: gs.Graph, context: Context) -> Rewritten:
    """Drop the inputs without effect, give each call its rotary tables and what TensorRT finds the plugin by."""
    known: dict[bytes, tuple[gs.Tensor, gs.Tensor]] = {}
    calls, misses = attention_calls(graph, context)
    for node, layer in calls:
        rotation = context.rotations.get(layer.layer)
        inputs: dict[str, gs.Tensor | None] = dict(zip(attention_op.INPUT_NAMES, node.inputs))
        cos, sin = tables(graph, rotation, context.element, known) if rotation else (None, None)
        inputs.update(cos=cos, sin=sin)
        if has_sinks(node) is False:
            inputs["sinks"] = None
        there = {name: inputs.get(name) for name in attention_op.INPUT_NAMES}
        there = {name: tensor for name, tensor in there.items() if tensor is not None and not tensor.is_empty()}
        node.inputs = list(there.values())
        node.attrs["rotary_interleaved"] = int(rotation is not None and rotation.interleaved)
        node.attrs.update({flag: int(name in there) for flag, name in PRESENCE.items()})
        node.attrs.update(plugin_version=PLUGIN_VERSION, plugin_namespace=PLUGIN_NAMESPACE)
    return Rewritten(len(calls), misses)


def no_holes(graph: gs.Graph, context: Context) -> list[NearMiss]:
    """The plugin nodes among whose inputs one is left out, which TensorRT refuses: there must be none."""
    return [NearMiss(node.name, "one of its inputs is left out") for node in graph.nodes
            if is_op(node, attention_op.OP, attention_op.DOMAIN) and any(each.is_empty() for each in node.inputs)]


PASSES = [
    *FIRST,
    Pass("rotary_inside", fold_rotary, requires=("refuse_layers",)),
    Pass("unreshape", head_axes.unreshape, requires=("rotary_inside",)),
    Pass("lower_attention", lower_attention, requires=("rotary_inside",), ensures=no_holes,
         expect=lambda context: len(context.spec.layers)),
]
