"""A small graph with a weight that has a recipe and no bytes: y = Relu(x @ W^T + b), z = y * 2."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gqa_export.graph_io import TensorFact

INPUTS = (TensorFact("x", "float32", ("batch", 4)),)
OUTPUTS = (TensorFact("y", "float32", ("batch", 3)), TensorFact("z", "float32", ("batch", 3)))


def weight(name: str, dims: list[int], location: str, dtype: int = TensorProto.FLOAT) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, dims=dims, data_type=dtype, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def model() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Transpose", ["W"], ["Wt"], name="a/Transpose_0", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "Wt"], ["a"], name="a/MatMul_0"),
        helper.make_node("Add", ["a", "b"], ["c"], name="a/Add_0"),
        helper.make_node("Relu", ["c"], ["y"], name="a/Relu_0"),
        helper.make_node("Mul", ["y", "two"], ["z"], name="a/Mul_0"),
    ]
    values = [[helper.make_tensor_value_info(fact.name, TensorProto.FLOAT, fact.shape) for fact in facts]
              for facts in (INPUTS, OUTPUTS)]
    graph = helper.make_graph(nodes, "small", *values, [
        weight("W", [3, 4], "weights:a.weight"), weight("b", [3], "weights:a.bias"),
        numpy_helper.from_array(np.array(2, np.float32), "two")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
