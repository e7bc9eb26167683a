"""Relu and Clip behind a product with DequantizeLinear, spelled as Max and Min.

ONNX Runtime makes one fast operator of DequantizeLinear and MatMul when it loads a graph. Where Relu or Clip alone
reads the product, and is itself read once, it looks for QuantizeLinear behind them instead, finds none, and dequantizes
the matrix at every step (NodeGroupSelector::GetQDQSelection; seen in 1.32). Max and Min compute the same.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from ...graph import edit, match


def spell_clamp(graph: gs.Graph, product: gs.Node, element: int) -> None:
    """Make Max and Min of a Relu or Clip that alone reads a product, or a product of two axes and its bias, which ONNX
    Runtime makes Gemm. element: ONNX type of the numbers."""
    clamp = match.sole_consumer(graph, product.outputs[0])
    rank = len(product.inputs[0].shape or ())
    if match.is_op(clamp, "Add") and rank != 3 and any(match.const_value(each) is not None or match.is_weight(each)
                                                       for each in clamp.inputs):
        clamp = match.sole_consumer(graph, clamp.outputs[0])
    if clamp is None or clamp.op not in ("Relu", "Clip") or clamp.domain:
        return
    out, limits = clamp.outputs[0], _limits(clamp, element)
    if len(out.outputs) != 1 or match.is_output(graph, out) or not limits:
        return
    value = clamp.inputs[0]
    edit.remove(clamp)
    for number, (operator, limit) in enumerate(limits, 1):
        last = [out] if number == len(limits) else 1
        value = edit.add_node(graph, operator, [value, limit], name=f"{clamp.name}/{operator}", outputs=last)[0]


def _limits(clamp: gs.Node, element: int) -> list[tuple[str, gs.Tensor]]:
    """The operators that do what a Relu or Clip does, and what each takes besides."""
    if clamp.op == "Relu":
        return [("Max", edit.constant(f"{clamp.name}/zero", np.zeros((), np.float32), element))]
    given = [*clamp.inputs, None, None][1:3]
    return [(operator, limit) for operator, limit in zip(("Max", "Min"), given)
            if limit is not None and not (isinstance(limit, gs.Variable) and limit.is_empty())]
