"""Gemm as what it means: a product with a weight, transposed where it says so, and the addition of its bias. The rules
for cuts then need one operator less, and a bias is added once however many ranks share a sum."""

from __future__ import annotations

import onnx
from onnx import helper


def plain_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model with every Gemm whose factors are 1 and whose first input is not transposed taken apart."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes: list[onnx.NodeProto] = []
    for node in copy.graph.node:
        nodes += _apart(node) if node.op_type == "Gemm" and not node.domain else [node]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del copy.graph.node[:]
    copy.graph.node.extend(kept)
    return copy


def _apart(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    facts = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    if facts.get("transA", 0) or facts.get("alpha", 1.0) != 1.0 or facts.get("beta", 1.0) != 1.0:
        return [node]
    left, right = node.input[0], node.input[1]
    made = []
    if facts.get("transB", 0):
        made.append(helper.make_node("Transpose", [right], [f"{node.name}/turned.0"], name=f"{node.name}/turned",
                                     perm=[1, 0]))
        right = f"{node.name}/turned.0"
    bias = node.input[2] if len(node.input) > 2 else ""
    product = f"{node.name}/product.0" if bias else node.output[0]
    name = f"{node.name}/product" if bias else node.name
    made.append(helper.make_node("MatMul", [left, right], [product], name=name))
    if bias:
        made.append(helper.make_node("Add", [product, bias], [node.output[0]], name=node.name))
    return made
