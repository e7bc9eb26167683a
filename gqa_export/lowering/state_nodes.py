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
from ..state_ops import LINEAR_ATTENTION, RULES, is_delta, is_gated
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
            if (row := ("row", id(new_lengths))) not in self._made:
                step_S = self.shared("step", "Range", 0, self._steps(call), 1)
                self._made[row] = self.shared("row", "Less", step_S,
                                              self.shared("new", "Unsqueeze", new_lengths, [1]))
            self._made[key] = self.shared(f"real_{axis}", "Unsqueeze", self._made[row], [axis])
        return self._made[key]

    def _steps(self, call: StateCall) -> gs.Tensor:
        """The number of columns of the batch, a scalar."""
        if "steps" not in self._made:
            ids = [tensor for tensor in self.graph.inputs if tensor.name == graph_io.INPUT_IDS]
            place = 1 if ids or call.op is LINEAR_ATTENTION else 2
            shape = self.shared("shape", "Shape", ids[0] if ids else call.node.inputs[0], start=place, end=place + 1)
            self._made["steps"] = self.shared("steps", "Squeeze", shape, [0])
        return self._made["steps"]

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
                attrs: dict[str, Any]) -> None:
        """Put a fused operator in the place of a call, and what makes its results those of the contract."""
        output, new_state = call.node.outputs
        name, conv = call.node.name, len(call.state.shape) == 2
        result, end_state = gs.Variable(f"{name}/fused.0"), gs.Variable(f"{name}/fused.1") if conv else new_state
        call.node.outputs.clear()
        edit.add_node(self.graph, op, inputs, name=f"{name}/fused", domain=domain, attrs=attrs,
                      outputs=[result, end_state])
        narrow = not _is_fp32(call.node.inputs[0])
        done = [gs.Variable(f"{name}/wide.0")] if narrow else [output]
        if conv:
            self._last_inputs(call, end_state, new_state)
            edit.add_node(self.graph, "Where", [self.real(call, 1), result, self.zero], name=f"{name}/output",
                          outputs=done)
        else:
            heads, _, size = call.state.shape
            shape = edit.constant(f"{name}/heads", np.array([0, 0, heads, size], np.int64))
            edit.add_node(self.graph, "Reshape", [self.masked(call, "output", result, axis=2), shape],
                          name=f"{name}/output", outputs=done)
        if narrow:
            edit.add_node(self.graph, "CastLike", [*done, call.node.inputs[0]], name=f"{name}/narrow",
                          outputs=[output])
        call.node.inputs.clear()

    def _last_inputs(self, call: StateCall, end_state: gs.Tensor, new_state: gs.Tensor) -> None:
        """Make the new state of a convolution: its last K-1 real inputs, those of its state included, [B, C, K-1].

        Without padding that is the operator's own, `end_state`. Gathering takes as long as the convolution of one
        token, so it is done only where a row is padded.
        """
        channels, kept = call.state.shape
        name, made = call.node.name, [gs.Variable(f"{call.node.name}/{branch}.0", np.float32, new_state.shape)
                                      for branch in ("whole", "padded")]
        inputs_BCL, index_BCJ = (gs.Variable(f"{name}/{label}.0") for label in ("inputs", "index"))
        sizes = edit.constant(f"{name}/sizes", np.array([1, channels, 1], np.int64))
        whole = [gs.Node("Identity", f"{name}/whole", inputs=[end_state], outputs=made[:1])]
        padded = [gs.Node("Concat", f"{name}/inputs", {"axis": 2}, [call.given("state"), self.wide(call, "x")],
                          [inputs_BCL]),
                  gs.Node("Expand", f"{name}/index", {}, [self._last_places(call, kept), sizes], [index_BCJ]),
                  gs.Node("GatherElements", f"{name}/padded", {"axis": 2}, [inputs_BCL, index_BCJ], made[1:])]
        branches = {f"{branch}_branch": gs.Graph(nodes, outputs=[out], name=f"{name}/{branch}")
                    for branch, nodes, out in (("then", whole, made[0]), ("else", padded, made[1]))}
        edit.add_node(self.graph, "If", [self._without_padding(call)], name=f"{name}/new_state", outputs=[new_state],
                      attrs=branches)

    def _last_places(self, call: StateCall, kept: int) -> gs.Tensor:
        """Where the last K-1 real inputs of each row lie in [state | new inputs]: [B, 1, K-1]."""
        key = ("last", id(call.given("new_lengths")), kept)
        if key not in self._made:
            taps = edit.constant(f"states/last_{kept}.taps", np.arange(kept, dtype=np.int64).reshape(1, 1, kept))
            new_B11 = self.shared(f"last_{kept}/new", "Unsqueeze", call.given("new_lengths"), [1, 2])
            self._made[key] = self.shared(f"last_{kept}/place", "Add", new_B11, taps)
        return self._made[key]

    def _without_padding(self, call: StateCall) -> gs.Tensor:
        """Whether every row brings as many tokens as the batch has columns."""
        key = ("whole", id(call.given("new_lengths")))
        if key not in self._made:
            fewest = self.shared("fewest", "ReduceMin", call.given("new_lengths"), keepdims=0)
            self._made[key] = self.shared("whole", "GreaterOrEqual", fewest, self._steps(call))
        return self._made[key]

    def bias(self, call: StateCall) -> gs.Tensor | None:
        """The bias of a convolution; None where it is zero."""
        value = const_value(call.given("bias"))
        return None if value is not None and not value.any() else self.wide(call, "bias")

    def kernel(self, call: StateCall) -> gs.Tensor:
        """The weight of a convolution as operators take it, [C, 1, K]."""
        weight = call.given("weight")
        squeeze = produced_by(weight, "Squeeze")
        if squeeze is not None and list(squeeze.inputs[0].shape or [])[:2] == [call.state.shape[0], 1]:
            weight = squeeze.inputs[0]  # as it was stored
            return weight if _is_fp32(weight) else self.near(call)("weight/wide", "Cast", weight, to=FLOAT)
        return self.near(call)("weight/kernel", "Unsqueeze", self.wide(call, "weight"), [1])


def _is_fp32(tensor: gs.Tensor) -> bool:
    return tensor.dtype is not None and tensor.dtype == np.float32
