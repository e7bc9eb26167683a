"""What both TensorRT targets do first: refuse what attention cannot hold, write the capacity into the shapes."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ... import graph_io, targets
from ...graph.passes import Pass
from ..context import Context


def refuse_layers(graph: gs.Graph, context: Context) -> int:
    """Refuse a model with a layer that the target's attention cannot hold."""
    targets.refuse_layers(context.spec.layers, context.target)
    return 0


def literal_capacity(graph: gs.Graph, context: Context) -> int:
    """Put the number for the named axis of every cache input and output; counts them."""
    count = 0
    for tensor in (*graph.inputs, *graph.outputs):
        if graph_io.CAPACITY in (tensor.shape or ()):
            tensor.shape = [context.options.capacity if axis == graph_io.CAPACITY else axis for axis in tensor.shape]
            count += 1
    return count


PREPARE: list[Pass] = []
FIRST = [
    Pass("refuse_layers", refuse_layers, expect=lambda context: 0),
    Pass("literal_capacity", literal_capacity, expect=lambda context: 4 * len(context.spec.layers)),
]
