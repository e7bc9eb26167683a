"""gqa::LinearAttention -> ai.onnx LinearAttention, new in opset 27. Dimensions as in `gqa_export.state_ops`.

Only where the installed runtime runs models of that opset; else, and for convolutions always, the body in standard
operators is written (`state_functions`). The standard shares one state among several query heads and not the other way
round, so queries and keys are repeated; it knows no lengths, so padding is set to zero before and after. Source: onnx
docs/Operators.md, LinearAttention-27.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ...graph.passes import Rewritten
from ...state_ops import LINEAR_ATTENTION, RULES
from ..context import Context
from ..state_calls import state_calls
from ..state_nodes import StateNodes

OPSET = 27


def lower_states(graph: gs.Graph, context: Context) -> Rewritten:
    """Rewrite the calls of linear attention that the runtime has the operator for; the others are left."""
    calls, misses = state_calls(graph, context)
    nodes, count = StateNodes(graph), 0
    for call in calls:
        if call.op is LINEAR_ATTENTION and context.fused_state_op(call.op.name):
            heads = call.state.shape[0]
            attrs = {"q_num_heads": heads, "kv_num_heads": heads, "update_rule": RULES[call.node.attrs["rule"]],
                     "scale": float(call.node.attrs["scale"])}
            nodes.replace(call, LINEAR_ATTENTION.name, nodes.linear_inputs(call, repeated=True), domain="", attrs=attrs)
            count += 1
    return Rewritten(count, misses)


def needs_opset(context: Context) -> int:
    """The opset that the rewritten calls need; 0 if none was rewritten."""
    return OPSET if context.log.counts.get("lower_states") else 0
