"""Target `onnx`: ONNX Runtime makes MatMulNBits of every DequantizeLinear and MatMul when it loads a graph. That makes
them fast, and the comparison as shipped takes it for granted.

It does not where a Relu or Clip alone reads the product (it looks for QuantizeLinear behind that), nor where anything
else reads the codes or scales.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from gqa_export.graph import edit
from gqa_export.graph.passes import run_passes
from gqa_export.lowering.context import Context, LowerOptions
from gqa_export.lowering.quantized.passes import PASSES
from gqa_export.quantized.facts import facts_of
from gqa_export.quantized.matrix import QuantizedMatrix
from gqa_export.targets import get_target

from .packed_model import write_packed
from .test_quantized import FORMS, SPEC, close, made

COLUMNS, ROWS = 96, 40
LOW, HIGH = np.float32(-0.75), np.float32(0.5)
TAILS = {
    "relu": ([helper.make_node("Relu", ["y"], ["t"], "t/Relu_0")], lambda y: np.maximum(y, 0)),
    "clip": ([helper.make_node("Clip", ["y", "low", "high"], ["t"], "t/Clip_0")],
             lambda y: np.clip(y, LOW, HIGH)),
    "clip from below": ([helper.make_node("Clip", ["y", "low"], ["t"], "t/Clip_0")],
                        lambda y: np.maximum(y, LOW)),
    "clip from above": ([helper.make_node("Clip", ["y", "", "high"], ["t"], "t/Clip_0")],
                        lambda y: np.minimum(y, HIGH)),
    "none": ([helper.make_node("Identity", ["y"], ["t"], "t/Identity_0")], lambda y: y),
}


def run(matrix: QuantizedMatrix, folder: Path, tail: str = "none", rank: int = 3, bias: bool = False,
        times: int = 1) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """Products of a matrix with x and -x ..., multiplied with one another, and what follows them: computed, and in
    float64; the operators of the graph, and those that ONNX Runtime makes of them."""
    shape = ["b", "s", COLUMNS][-rank:]
    nodes, product, given = [], "", "x"
    for number in range(times):
        if number:
            nodes.append(helper.make_node("Neg", [given], [f"x{number}"], f"n/Neg_{number}"))
            given = f"x{number}"
        nodes += [helper.make_node("Transpose", ["w"], [f"wt{number}"], f"a/Transpose_{number}", perm=[1, 0]),
                  helper.make_node("MatMul", [given, f"wt{number}"], [f"m{number}"], f"a/MatMul_{number}")]
        if number:
            nodes.append(helper.make_node("Mul", [product, f"m{number}"], [f"p{number}"], f"a/Mul_{number}"))
        product = f"p{number}" if number else "m0"
    behind, follow = TAILS[tail]
    if bias:
        nodes.append(helper.make_node("Add", [product, "bias"], ["y"], "a/Add_0"))
    else:
        nodes[-1].output[0] = "y"
    addend = np.linspace(-1, 1, ROWS, dtype=np.float32)
    constants = [onnx.numpy_helper.from_array(value, name)
                 for name, value in (("low", LOW), ("high", HIGH), ("bias", addend))]
    weight = TensorProto(name="w", dims=matrix.shape, data_type=TensorProto.FLOAT,
                         data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="weights:w")
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*shape[:-1], ROWS])
    # something reads what follows: an output of the graph would not be looked through
    nodes += [*behind, helper.make_node("Neg", ["t"], ["logits"], "t/Neg_0")]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)], [out],
                              [weight, *constants])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    context = Context(SPEC, get_target("onnx"), LowerOptions("onnx", quantized={"w": facts_of(matrix)}, exact=True),
                      model)
    loaded = edit.load(model)
    run_passes(loaded, PASSES, context)
    lowered = edit.save(loaded)
    write_packed(lowered, matrix, context, folder)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(folder / "m.onnx", options, providers=["CPUExecutionProvider"])
    values = np.random.default_rng(1).standard_normal([2, 3, COLUMNS][-rank:]).astype(np.float32)
    single = values.astype(np.float64) @ matrix.dequantize().T
    whole = single**times * (-1) ** (times // 2) + (addend if bias else 0)
    made_of = onnx.load(folder / "optimized.onnx", load_external_data=False)
    return (session.run(None, {"x": values})[0], -follow(whole), [node.op_type for node in lowered.graph.node],
            [node.op_type for node in made_of.graph.node])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_made_a_fast_product(form: str, tmp_path: Path) -> None:
    got, wanted, _, ops = run(made(0, ROWS, COLUMNS, **FORMS[form]), tmp_path)
    close(got, wanted)
    assert ("MatMulNBits" in ops, "DequantizeLinear" in ops) == (True, False)


@pytest.mark.parametrize(("rank", "bias"), [(3, False), (3, True), (2, True)])
@pytest.mark.parametrize("tail", TAILS)
def test_whatever_follows_a_product_it_is_a_fast_one(tail: str, rank: int, bias: bool, tmp_path: Path) -> None:
    """Of two axes, a product and a bias become Gemm first."""
    got, wanted, _, ops = run(made(0, ROWS, COLUMNS), tmp_path, tail, rank, bias)
    close(got, wanted)
    assert ("MatMulNBits" in ops, "DequantizeLinear" in ops) == (True, False)


@pytest.mark.parametrize("form", ["4 bits", "zero points", "minimum of float16"])
def test_every_product_of_a_matrix_that_several_layers_share_is_a_fast_one(form: str, tmp_path: Path) -> None:
    got, wanted, before, ops = run(made(0, ROWS, COLUMNS, **FORMS[form]), tmp_path, times=3)
    close(got, wanted, 1e-5)  # of three products, each off by as much as one
    assert before.count("DequantizeLinear") == ops.count("MatMulNBits") == 3
    assert "DequantizeLinear" not in ops
    codes = sum(tensor.data_type == TensorProto.INT4 for tensor in onnx.load(
        tmp_path / "m.onnx", load_external_data=False).graph.initializer)
    assert codes in (0, 3)  # zero points: codes are UINT4
