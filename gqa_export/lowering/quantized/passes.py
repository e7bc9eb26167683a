"""The pass that puts quantized weights into a lowered graph, in the operators of its target."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ...graph.passes import NearMiss, Pass, Rewritten
from ..context import Context
from . import dequantize_linear, nbits
from .parts import SEPARATOR


def quantize(graph: gs.Graph, context: Context) -> Rewritten:
    """Rewrite every reader of a quantized weight."""
    quantize_graph = nbits.quantize_graph if context.target.nbits else dequantize_linear.quantize_graph
    return quantize_graph(graph, context)


def all_are_accounted_for(graph: gs.Graph, context: Context) -> list[NearMiss]:
    """Quantized weights of which it is not known how the graph holds them: there must be none."""
    return [NearMiss(name, "nothing in the graph reads this weight") for name in context.options.quantized
            if name not in context.held]


PASSES: list[Pass[gs.Graph, Context]] = [Pass("quantize", quantize, ensures=all_are_accounted_for)]

__all__ = ["PASSES", "SEPARATOR"]
