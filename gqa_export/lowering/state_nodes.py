"""What lowered state ops share: which positions hold a token, padding set to zero, the last real inputs of a
convolution. What depends on lengths alone is computed once for the whole graph.

Fused operators know no lengths. A padded position leaves their state alone if its key, value, decay and beta are zero;
they are chosen, not multiplied, so that a NaN is zero too. Dimensions as in `gqa_export.state_ops`; J is K-1, L is
K-1+S.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .. import graph_io
from ..graph import edit
from ..graph.match import const_value, produced_by
from ..graph.node_builder import Nodes
from ..state_ops import RULES, is_delta, is_gated
from .state_calls import StateCall

FLOAT = onnx.TensorProto.FLOAT


class StateNodes:
    """Adds the nodes around fused operators to one graph."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph, self.shared = graph, Nodes(graph, "states")
        self.zero = edit.constant("states/zero", np.array(0, np.float32))
        self._made: dict[Any, gs.Tensor] = {}

    def near(self, call: StateCall) -> Nodes:
        """Adds nodes that are named beside a call."""
        return Nodes(self.graph, call.node.name)

    def real(self, call: StateCall, axis: int) -> gs.Tensor:
        """Which positions of a call hold a token, with one more axis at `axis`: [B, S, 1] or [B, 1, S]."""
        new_lengths = call.given("new_lengths")
        key = ("real", id(new_lengths), axis)
        if key not in self._made:
            node = self.shared
            ids = [tensor for tensor in self.graph.inputs if tensor.name == graph_io.INPUT_IDS]
            source, place = (ids[0], 1) if ids else (call.node.inputs[0], 1 if axis == 2 else 2)
            end = node(f"end_{axis}", "Squeeze", node(f"steps_{axis}", "Shape", source, start=place, end=place + 1),
                       [0])
            step_S = node(f"step_{axis}", "Range", 0, end, 1)
            row_BS = node(f"row_{axis}", "Less", step_S, node(f"new_{axis}", "Unsqueeze", new_lengths, [1]))
            self._made[key] = node(f"real_{axis}", "Unsqueeze", row_BS, [axis])
        return self._made[key]

    def wide(self, call: StateCall, name: str) -> gs.Tensor:
        """An input of a call in fp32, the type of the states."""
        tensor = call.given(name)
        return tensor if _is_fp32(tensor) else self.near(call)(f"{name}/wide", "Cast", tensor, to=FLOAT)

    def flat(self, call: StateCall, name: str, *, masked: bool = True, repeated: bool = False) -> gs.Tensor:
        """An input [B, S, H, D] of linear attention as [B, S, H * D] in fp32, zero where it is padded. repeated: each
        head as often as it is shared."""
        tensor, heads, near = self.wide(call, name), call.state.shape[0], self.near(call)
        if repeated and not (tensor.shape and tensor.shape[2] == heads):
            times = near(f"{name}/times", "Div", [heads], near(f"{name}/heads", "Shape", tensor, start=2, end=3))
            shape = near(f"{name}/shape", "Concat", [1, 1, 1], times, [1], axis=0)
            tensor = near(f"{name}/repeated", "Expand", near(f"{name}/column", "Unsqueeze", tensor, [3]), shape)
        tensor_BSX = near(f"{name}/flat", "Reshape", tensor, [0, 0, -1])
        return self.masked(call, name, tensor_BSX, axis=2) if masked else tensor_BSX

    def masked(self, call: StateCall, label: str, tensor: gs.Tensor, axis: int) -> gs.Tensor:
        """A tensor with zeros at padded positions. axis: as of `real`."""
        return self.near(call)(f"{label}/real", "Where", self.real(call, axis), tensor, self.zero)

    def linear_inputs(self, call: StateCall, *, repeated: bool = False) -> list[gs.Tensor | None]:
        """query, key, value, state, decay and beta as the fused operators take them; None for what the rule lacks.

        repeated: queries and keys get a head for each state; else they stay shared.
        """
        rule = RULES[call.node.attrs["rule"]]
        beta = self.masked(call, "beta", self.wide(call, "beta"), axis=2) if is_delta(rule) else None
        return [self.flat(call, "query", masked=False, repeated=repeated),
                self.flat(call, "key", repeated=repeated), self.flat(call, "value"), call.given("state"),
                self.flat(call, "decay") if is_gated(rule) else None, beta]

    def replace(self, call: StateCall, op: str, inputs: list[gs.Tensor | None], *, domain: str,
                attrs: dict[str, Any], keep_state: bool) -> None:
        """Put a fused operator and what makes its first output that of the contract in the place of a call.

        keep_state: the operator's own second output is the new state; else the last inputs of a convolution are.
        """
        output, new_state = call.node.outputs
        last = None if keep_state else self.last_inputs(call)
        result, name = gs.Variable(f"{call.node.name}/fused.0"), call.node.name
        call.node.outputs.clear()
        edit.add_node(self.graph, op, inputs, name=f"{name}/fused", domain=domain, attrs=attrs,
                      outputs=[result, new_state if keep_state else gs.Variable(f"{name}/fused.1")])
        if last is not None:
            edit.add_node(self.graph, "Identity", [last], name=f"{name}/new_state", outputs=[new_state])
        narrow = not _is_fp32(call.node.inputs[0])
        done = [gs.Variable(f"{name}/wide.0")] if narrow else [output]
        if len(call.state.shape) == 3:
            heads, _, size = call.state.shape
            shape = edit.constant(f"{name}/heads", np.array([0, 0, heads, size], np.int64))
            edit.add_node(self.graph, "Reshape", [self.masked(call, "output", result, axis=2), shape],
                          name=f"{name}/output", outputs=done)
        else:
            edit.add_node(self.graph, "Where", [self.real(call, 1), result, self.zero], name=f"{name}/output",
                          outputs=done)
        if narrow:
            edit.add_node(self.graph, "CastLike", [*done, call.node.inputs[0]], name=f"{name}/narrow",
                          outputs=[output])
        call.node.inputs.clear()

    def bias(self, call: StateCall) -> gs.Tensor | None:
        """The bias of a convolution; None where it is zero."""
        value = const_value(call.given("bias"))
        return None if value is not None and not value.any() else self.wide(call, "bias")

    def last_inputs(self, call: StateCall) -> gs.Tensor:
        """The last K-1 real inputs of a convolution, those of its state included: [B, C, K-1]."""
        channels, kept = call.state.shape
        new_lengths = call.given("new_lengths")
        key = ("last", id(new_lengths), channels, kept)
        if key not in self._made:
            node, label = self.shared, f"last_{channels}_{kept}"
            places = edit.constant(f"states/{label}.taps", np.arange(kept, dtype=np.int64).reshape(1, 1, kept))
            last_B1J = node(f"{label}/place", "Add", node(f"{label}/new", "Unsqueeze", new_lengths, [1, 2]), places)
            self._made[key] = node(f"{label}/index", "Expand", last_B1J, [1, channels, 1])
        inputs_BCL = self.near(call)("inputs", "Concat", call.given("state"), self.wide(call, "x"), axis=2)
        return self.near(call)("last", "GatherElements", inputs_BCL, self._made[key], axis=2)

    def kernel(self, call: StateCall) -> gs.Tensor:
        """The weight of a convolution as operators take it, [C, 1, K]."""
        weight = call.given("weight")
        squeeze = produced_by(weight, "Squeeze")
        if squeeze is not None and squeeze.inputs[0].shape and len(squeeze.inputs[0].shape) == 3:
            weight = squeeze.inputs[0]  # as it was stored; the middle axis of a depthwise kernel is 1
            return weight if _is_fp32(weight) else self.near(call)("weight/wide", "Cast", weight, to=FLOAT)
        return self.near(call)("weight/kernel", "Unsqueeze", self.wide(call, "weight"), [1])


def _is_fp32(tensor: gs.Tensor) -> bool:
    return tensor.dtype is not None and tensor.dtype == np.float32
