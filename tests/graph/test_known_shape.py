"""What nodes say of a tensor's shape, held against what ONNX Runtime computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from gqa_export.graph import edit
from gqa_export.graph.known_shape import broadcast, known_shape

X = np.random.default_rng(0).standard_normal((10, 6), np.float32)
CHAINS: dict[str, tuple[list[tuple[str, list[str], dict[str, Any]]], tuple[int | None, ...]]] = {
    "reshaped": ([("Reshape", ["x", "[5,-1,6]"], {})], (5, None, 6)),
    "a size that is copied": ([("Reshape", ["x", "[0,2,3]"], {})], (None, 2, 3)),
    "a gate": ([("Reshape", ["x", "[5,-1,6]"], {}), ("Sigmoid", ["0"], {}), ("Mul", ["0", "1"], {})], (5, None, 6)),
    "repeated": ([("Reshape", ["x", "[1,10,6]"], {}), ("Expand", ["0", "[5,1,1]"], {})], (5, 10, 6)),
    "a product": ([("Reshape", ["x", "[5,2,6]"], {}), ("Transpose", ["0"], {"perm": [0, 2, 1]}),
                   ("MatMul", ["0", "1"], {})], (5, 2, 2)),
    "halves": ([("Reshape", ["x", "[5,-1,6]"], {}), ("Split", ["0"], {"axis": -1, "num_outputs": 2})],
               (5, None, None)),
    "every second": ([("Reshape", ["x", "[5,2,6]"], {}), ("Slice", ["0", "[0]", "[9]", "[-1]", "[2]"], {})],
                     (5, 2, None)),
    "axes put in": ([("Reshape", ["x", "[5,12]"], {}), ("Unsqueeze", ["0", "[1,-1]"], {})], (5, 1, 12, 1)),
    "together": ([("Reshape", ["x", "[5,2,6]"], {}), ("Concat", ["0", "0"], {"axis": 0})], (None, 2, 6)),
    "the largest": ([("Gemm", ["x", "x"], {"transB": 1}), ("TopK", ["0", "[2]"], {})], (None, None)),
}


def chain(nodes: list[tuple[str, list[str], dict[str, Any]]]) -> onnx.ModelProto:
    """A graph of nodes whose inputs are x, constants as they are written, and the first results of earlier nodes."""
    names = sorted({name for _, inputs, _ in nodes for name in inputs if name.startswith("[")})
    made = []
    for number, (op, inputs, attrs) in enumerate(nodes):
        outputs = [str(number)] + ([f"{number}.1"] if op in ("Split", "TopK") else [])
        made.append(helper.make_node(op, inputs, outputs, f"node_{number}", **attrs))
    constants = [numpy_helper.from_array(np.array([int(each) for each in name[1:-1].split(",")]), name)
                 for name in names]
    out = helper.make_empty_tensor_value_info(str(len(nodes) - 1))
    out.type.tensor_type.elem_type = TensorProto.FLOAT
    x = helper.make_empty_tensor_value_info("x")
    x.type.tensor_type.elem_type = TensorProto.FLOAT
    graph = helper.make_graph(made, "g", [x], [out], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("name", CHAINS)
def test_what_is_known_is_what_is_computed(name: str) -> None:
    nodes, wanted = CHAINS[name]
    model = chain(nodes)
    found = known_shape(edit.load(model).outputs[0])
    assert found == wanted
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    computed = session.run(None, {"x": X})[0].shape
    assert len(computed) == len(found)
    assert all(size in (None, real) for size, real in zip(found, computed, strict=True))


@pytest.mark.parametrize("nodes", [[("Mul", ["x", "x"], {})], [("Sigmoid", ["x"], {})], [("Det", ["x"], {})],
                                   [("Expand", ["x", "[5,10,6]"], {})]])
def test_what_is_not_known_is_not_guessed(nodes: list[tuple[str, list[str], dict[str, Any]]]) -> None:
    assert known_shape(edit.load(chain(nodes)).outputs[0]) is None


def test_sizes_that_are_not_known_stay_so() -> None:
    assert broadcast([(None, 3), (5, 1, 1)]) == (5, None, 3)
    assert broadcast([(None, 3), (4, 1)]) == (4, 3)
    assert broadcast([(2,), None]) is None
