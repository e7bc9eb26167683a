"""The calls of the state ops in a graph, each with the spec of its state: the one way by which every target finds them.

A call is found by the state it reads, and held to the spec. Dimensions as in `gqa_export.state_ops`.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_graphsurgeon as gs

from .. import graph_io
from ..errors import UnsupportedModel
from ..graph.passes import NearMiss, Rewritten
from ..spec import StateSpec
from ..state_ops import CAUSAL_CONV, DOMAIN, LINEAR_ATTENTION, STATE_OPS, StateOp
from .context import Context

OP_OF_KIND = {"conv": CAUSAL_CONV, "recurrent": LINEAR_ATTENTION}
_OPS = {op.name: op for op in STATE_OPS}


class StateCall(NamedTuple):
    """A node that is a state op, which one, and the state that it reads and writes."""

    node: gs.Node
    op: StateOp
    state: StateSpec

    def given(self, name: str) -> gs.Tensor:
        """The tensor that the node takes as the input `name`."""
        return self.node.inputs[self.op.input_index(name)]


class StateCalls(NamedTuple):
    """The calls of a graph in graph order, and what stands where a state's call should be."""

    found: list[StateCall]
    near_misses: tuple[NearMiss, ...]


def state_calls(graph: gs.Graph, context: Context) -> StateCalls:
    """Find the call of each state.

    Raises:
        UnsupportedModel: the op of a call, its inputs or its attributes are not those of its state.
    """
    states = {graph_io.past_state(state): state for state in context.spec.states}
    found, misses = [], []
    for node in graph.nodes:
        op = _OPS.get(node.op) if node.domain == DOMAIN else None
        if op is None or not node.outputs:  # a removed node has none
            continue
        place = op.input_index("state")
        name = node.inputs[place].name if len(node.inputs) > place else ""
        if name in states:
            found.append(StateCall(node, op, states[name]))
            _check(found[-1])
        else:
            misses.append(NearMiss(node.name, f"its state is {name!r}, which is not a state of a layer"))
    read = {graph_io.past_state(call.state) for call in found}
    misses += [NearMiss(name, "no state op reads this state") for name in states if name not in read]
    return StateCalls(found, tuple(misses))


def check_states(graph: gs.Graph, context: Context) -> Rewritten:
    """Rewrite nothing; count the calls, each held to the spec of its state."""
    calls = state_calls(graph, context)
    return Rewritten(len(calls.found), calls.near_misses)


def number_of_states(context: Context) -> int:
    """How many calls a graph must have."""
    return len(context.spec.states)


def fused_states(context: Context) -> int:
    """How many calls become an operator of the runtime."""
    return sum(bool(context.fused_state_op(OP_OF_KIND[state.kind].name)) for state in context.spec.states)


def _check(call: StateCall) -> None:
    node, op, state = call
    wrong = []
    if op is not OP_OF_KIND[state.kind]:
        wrong.append(f"it is {op.name}, expected {OP_OF_KIND[state.kind].name}")
    if len(node.inputs) != len(op.inputs) or any(tensor.is_empty() for tensor in node.inputs):
        wrong.append(f"its inputs are {[tensor.name for tensor in node.inputs]}, expected {len(op.inputs)}")
    if set(node.attrs) != set(op.attribute_names):
        wrong.append(f"its attributes are {sorted(node.attrs)}, expected {sorted(op.attribute_names)}")
    wanted = graph_io.present_state(state)
    if len(node.outputs) != len(op.outputs) or node.outputs[-1].name != wanted:
        wrong.append(f"its outputs are {[tensor.name for tensor in node.outputs]}, expected {wanted!r} last")
    shape = node.inputs[op.input_index("state")].shape
    if not wrong and shape and tuple(shape[1:]) != state.shape:
        wrong.append(f"its state is {list(shape)}, expected [batch, {', '.join(map(str, state.shape))}]")
    if wrong:
        raise UnsupportedModel(f"a state op disagrees with {state.name} of layer {state.layer} of the model: "
                               f"{'; '.join(wrong)}", f"node {node.name!r}", "this is a fault of gqa-export: please "
                               "report the model it was exported from", code="E-GRAPH-STATE-FACTS")
