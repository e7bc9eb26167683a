"""What both TensorRT targets do first: refuse what attention cannot hold, write the capacity into the shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from ... import graph_io, target_refusals
from ...graph.passes import NearMiss, Pass, Rewritten
from ..context import Context

if TYPE_CHECKING:
    import onnx_ir


def refuse_layers(graph: gs.Graph, context: Context) -> int:
    """Refuse a model with layers that the target cannot hold; rewrites nothing."""
    target_refusals.refuse_layers(context.spec.layers, context.target, context.spec.states)
    return 0


def number_of_rings(context: Context) -> int:
    """Layers whose cache has fewer slots than the capacity."""
    return len(context.options.windows.layers) if context.options.windows else 0


def literal_capacity(graph: gs.Graph, context: Context) -> Rewritten:
    """Put the number for the named axis of every cache input and output but those of rings; counts them."""
    count, misses = 0, []
    rings = context.options.windows.layers if context.options.windows else ()
    for tensor in (*graph.inputs, *graph.outputs):
        if graph_io.layer_of_cache(tensor.name) in rings:
            continue
        if graph_io.CAPACITY in (tensor.shape or ()):
            tensor.shape = [context.options.capacity if axis == graph_io.CAPACITY else axis for axis in tensor.shape]
            count += 1
        elif graph_io.layer_of_cache(tensor.name) is not None:
            misses.append(NearMiss(tensor.name, f"its shape {tensor.shape} has no axis named {graph_io.CAPACITY!r}"))
    return Rewritten(count, tuple(misses))


PREPARE: list[Pass[onnx_ir.Model, Context]] = []
FIRST: list[Pass[gs.Graph, Context]] = [
    Pass("refuse_layers", refuse_layers),
    Pass("literal_capacity", literal_capacity, requires=("infer_shapes",),
         expect=lambda context: 4 * (len(context.spec.owners) - number_of_rings(context))),
]
