"""What both TensorRT targets do first: refuse what attention cannot hold, write the capacity into the shapes."""

from __future__ import annotations

from typing import Any

import onnx_graphsurgeon as gs

from .. import cache_io
from ..errors import GqaExportError
from ..graph.passes import Pass
from . import ort
from .table import TARGETS


def refuse_layers(graph: gs.Graph, context: Any) -> int:
    """Raise GqaExportError for the first layer that the target's attention cannot hold, naming a target that can."""
    for layer in context.spec.layers:
        reason = context.target.cannot_hold(layer)
        if reason:
            others = [row.name for row in TARGETS.values() if row.interface == context.target.interface
                      and not any(row.cannot_hold(each) for each in context.spec.layers)]
            raise GqaExportError(reason, f"layer {layer.layer}, target {context.target.name}",
                                 f"use --target {' or '.join(others)}" if others else
                                 "use --target ort and ONNX Runtime: no target for TensorRT can hold this model")
    return 0


def literal_capacity(graph: gs.Graph, context: Any) -> int:
    """Put the number for the named axis of every cache input and output; counts them."""
    count = 0
    for tensor in (*graph.inputs, *graph.outputs):
        if cache_io.CAPACITY in (tensor.shape or ()):
            tensor.shape = [context.options.capacity if axis == cache_io.CAPACITY else axis for axis in tensor.shape]
            count += 1
    return count


PREPARE: list[Pass] = []
FIRST = [
    Pass("refuse_layers", refuse_layers, expect=lambda context: 0),
    Pass("literal_capacity", literal_capacity, expect=lambda context: 4 * len(context.spec.layers)),
    Pass("note_element", ort.note_element, expect=lambda context: 1),
]
