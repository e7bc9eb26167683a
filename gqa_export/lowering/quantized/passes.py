"""The pass that puts quantized weights into a lowered graph, in the operators of its target."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ...graph.passes import NearMiss, Pass, Rewritten
from ...quantized.experts import expert_of
from ..context import Context, Held
from . import dequantize_linear, nbits
from .experts import spread_experts


def quantize(graph: gs.Graph, context: Context) -> Rewritten:
    """Rewrite every reader of a quantized weight."""
    quantize_graph = nbits.quantize_graph if context.target.nbits else dequantize_linear.quantize_graph
    done = quantize_graph(graph, context)
    _join_experts(context)
    return done


def _join_experts(context: Context) -> None:
    """What is known of each expert of a stack -> of the stack."""
    for name in [name for name in context.held if expert_of(name)[2]]:
        held, stack = context.held.pop(name), expert_of(name)[0]
        known = context.held.get(stack, Held())
        context.held[stack] = Held(known.forms or held.forms, {**known.parts, **held.parts},
                                   known.reason or held.reason)


def all_are_accounted_for(graph: gs.Graph, context: Context) -> list[NearMiss]:
    """Quantized weights of which it is not known how the graph holds them: there must be none."""
    return [NearMiss(name, "nothing in the graph reads this weight") for name in context.options.quantized
            if name not in context.held]


PASSES: list[Pass[gs.Graph, Context]] = [Pass("spread_experts", spread_experts),
                                         Pass("quantize", quantize, ensures=all_are_accounted_for)]
