"""Numbers in the model's code that bf16 or fp16 would round, kept as PyTorch uses them.

`tensor * 0.22` on a bf16 tensor multiplies by 0.22 in fp32 and rounds the product once; a graph that holds 0.22 as a
bf16 constant multiplies by 0.2197, off by 0.12 % in every layer of a Granite model. Such a node becomes a widening, the
same op in fp32 and a rounding, which is what PyTorch's own kernels do, and exact in the fp32 twin of the graph.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten
TAKES_SCALARS = frozenset((aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar))
"""not sums: there PyTorch's CPU kernels round the number first, as the graph does"""
LOW = (torch.bfloat16, torch.float16)


def keep_exact(graph: Graph) -> int:
    """Widen every op of `graph` between a low-precision tensor and a number that its format rounds; how many."""
    found = [node for node in graph.nodes if node.op == "call_function" and node.target in TAKES_SCALARS
             and _rounded(node)]
    for node in found:
        _widen(graph, node)
    return len(found)


def _rounded(node: Node) -> bool:
    tensor, number = node.args[:2]
    value, result = (each.meta.get("val") if isinstance(each, Node) else None for each in (tensor, node))
    if not isinstance(value, torch.Tensor) or not isinstance(result, torch.Tensor) or not isinstance(number, float):
        return False
    rounded = float(torch.tensor(number, dtype=value.dtype))
    return value.dtype in LOW and result.dtype == value.dtype and rounded != number


def _widen(graph: Graph, node: Node) -> None:
    tensor, value = node.args[0], node.meta["val"]
    assert isinstance(tensor, Node)
    with graph.inserting_before(node):
        wide = _cast(graph, tensor, torch.float32, node)
        product = graph.call_function(node.target, (wide, *node.args[1:]), dict(node.kwargs))  # type: ignore[arg-type]
        product.meta = {**node.meta, "val": value.to(torch.float32)}
        back = _cast(graph, product, value.dtype, node)
    back.meta["val"] = value
    node.replace_all_uses_with(back)
    graph.erase_node(node)


def _cast(graph: Graph, tensor: Node, dtype: torch.dtype, near: Node) -> Node:
    made = graph.call_function(aten._to_copy.default, (tensor,), {"dtype": dtype})
    made.meta = {**near.meta, "val": tensor.meta["val"].to(dtype)}
    return made
