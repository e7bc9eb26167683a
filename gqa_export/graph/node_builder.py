"""Appends nodes to a graph one by one, each with a name of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from . import edit, match

INT64 = onnx.TensorProto.INT64


class Nodes:
    """Adds nodes whose names start with `scope/`; numbers in the argument list become int64 constants."""

    def __init__(self, graph: gs.Graph, scope: str) -> None:
        self.graph, self.scope = graph, scope

    def __call__(self, label: str, op: str, *inputs: gs.Tensor | int | list[int], **attrs: Any) -> gs.Tensor:
        """Append `op`; its one output is `scope/label.0`."""
        tensors = [self._constant(f"{self.scope}/{label}.in{i}", x) if isinstance(x, (int, list)) else x
                   for i, x in enumerate(inputs)]
        return edit.add_node(self.graph, op, tensors, name=f"{self.scope}/{label}", attrs=attrs)[0]

    @staticmethod
    def _constant(name: str, value: int | list[int]) -> gs.Constant:
        return edit.constant(name, np.array(value, np.int64))


def heads_first(node: Nodes, label: str, flat_BSX: gs.Tensor, heads: int, size: int) -> gs.Tensor:
    """[B, S, heads * size] as [B, heads, S, size]; where the graph made the former from the latter, the latter."""
    reshape = match.produced_by(flat_BSX, "Reshape")
    if reshape is not None:
        transpose = match.produced_by(reshape.inputs[0], "Transpose")
        if transpose is not None and list(transpose.attrs.get("perm", [])) == [0, 2, 1, 3]:
            return transpose.inputs[0]
    split = node(f"{label}/heads", "Reshape", flat_BSX, [0, 0, heads, size])
    return node(f"{label}/heads_first", "Transpose", split, perm=[0, 2, 1, 3])
