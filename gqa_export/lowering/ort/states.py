"""State ops -> com.microsoft::LinearAttention and CausalConvWithState. Dimensions as in `gqa_export.state_ops`.

Source: onnxruntime docs/ContribOperators.md; both are in every version that this package takes (1.26 and later), for
fp32 on the CPU provider. Heads are shared as in the contract: the number of key heads follows from the width. They
know no lengths, so padding is set to zero before and after (`state_nodes`), and where a row is padded the state of a
convolution is gathered from its inputs: the operator's own is that of the padded end.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ...graph.passes import NearMiss, Rewritten
from ...state_ops import ACTIVATIONS, LINEAR_ATTENTION, RULES
from ..context import Context
from ..state_calls import StateCall, state_calls
from ..state_nodes import StateNodes

DOMAIN = "com.microsoft"


def lower_states(graph: gs.Graph, context: Context) -> Rewritten:
    """Rewrite every call that the runtime has an operator for; the others are left, and become their bodies."""
    calls, misses = state_calls(graph, context)
    nodes, count, left = StateNodes(graph), 0, list(misses)
    for call in calls:
        fused = context.fused_state_op(call.op.name)
        if not fused:
            context.remarks.append((call.state.layer, f"the installed onnxruntime has no fused operator for "
                                    f"{call.op.name}, so that it is written in standard operators"))
            left.append(NearMiss(call.node.name, "the installed onnxruntime has no fused operator for it"))
            continue
        if call.op is LINEAR_ATTENTION:
            _linear(nodes, call)
        else:
            _conv(nodes, call)
        count += 1
    return Rewritten(count, tuple(left))


def _linear(nodes: StateNodes, call: StateCall) -> None:
    heads, shape = call.state.shape[0], call.given("query").shape
    shared = shape is not None and isinstance(shape[2], int)  # else nothing was inferred: every state gets its own
    attrs = {"q_num_heads": shape[2] if shared else heads, "kv_num_heads": heads,
             "update_rule": RULES[call.node.attrs["rule"]], "scale": float(call.node.attrs["scale"])}
    nodes.replace(call, "LinearAttention", nodes.linear_inputs(call, repeated=not shared), domain=DOMAIN, attrs=attrs)


def _conv(nodes: StateNodes, call: StateCall) -> None:
    inputs = [nodes.wide(call, "x"), nodes.kernel(call), nodes.bias(call), call.given("state")]
    attrs = {"activation": ACTIVATIONS[call.node.attrs["activation"]] or "none"}
    nodes.replace(call, "CausalConvWithState", inputs, domain=DOMAIN, attrs=attrs)
