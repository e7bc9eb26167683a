"""The calls of layers whose cache is a ring: what they are told, and the axis of their cache tensors.

Dimensions as in `gqa_export.attention_op`; N slots.
"""

from __future__ import annotations

from itertools import chain

import onnx_graphsurgeon as gs

from .. import attention_op, graph_io
from ..graph.passes import NearMiss, Pass, Rewritten
from .attention_calls import attention_calls
from .context import Context


def make_rings(graph: gs.Graph, context: Context) -> Rewritten:
    """Let each call of a ring's layer use its slots again, and write their number into the shapes of its cache."""
    calls, misses = attention_calls(graph, context)
    windows, count = context.options.windows, 0
    assert windows is not None
    for node, layer in calls:
        slots = windows.slots(layer)
        if slots:
            node.attrs["growing"] = attention_op.RING
            if layer.owner is None:
                _resize(graph, layer.layer, slots)
                count += 1
    return Rewritten(count, misses)


def _resize(graph: gs.Graph, layer: int, slots: int) -> None:
    names = {*graph_io.past_names(layer), *graph_io.present_names(layer)}
    for tensor in chain(graph.inputs, graph.outputs):
        if tensor.name in names:
            batch, heads, _, size = tensor.shape
            tensor.shape = [batch, heads, slots, size]


def only_calls_read_rings(graph: gs.Graph, context: Context) -> list[NearMiss]:
    """What reads a ring and is no attention: there must be none, because it would take slots for tokens."""
    windows = context.options.windows
    assert windows is not None
    names = {name for number in windows.layers for name in graph_io.past_names(number)}
    return [NearMiss(node.name, f"{node.op} reads {tensor.name}, whose slots are used again") for node in graph.nodes
            for tensor in node.inputs if tensor.name in names and node.op != attention_op.OP
            and not (node.op == "Shape" and node.attrs.get("start", 0) == 0 and node.attrs.get("end") == 1)]


PASSES = (Pass("make_rings", make_rings, ensures=only_calls_read_rings,
               expect=lambda context: len(context.options.windows.layers) if context.options.windows else 0),)
