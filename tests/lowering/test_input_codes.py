"""Products whose inputs have the type of their weight: the graph computes what fp64 does with inputs rounded to the
nearest numbers of a table, and its operators are those that TensorRT's parser reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from quantized.test_input_codes import as_fp8, as_nvfp4
from refusal import refused

from gqa_export.bundle.input_claims import check_inputs, inputs_in
from gqa_export.bundle.quantization import Quantization, QuantizedWeight
from gqa_export.errors import InvalidBundle
from gqa_export.graph import edit
from gqa_export.graph.passes import run_passes
from gqa_export.lowering.context import Context, LowerOptions
from gqa_export.lowering.quantized.passes import PASSES
from gqa_export.lowering.tensorrt.fp4_inputs import interpret_fp4_inputs
from gqa_export.quantized.facts import facts_of
from gqa_export.quantized.input_codes import InputCodes
from gqa_export.targets import get_target
from gqa_export.validation.input_codes import bypass_inputs, rounds_inputs

from .test_quantized import NUMBERS, ORDER, SPEC, close, numbers, run

RULES = {"e4m3": as_fp8, "e2m1": as_nvfp4}
SMOOTH = np.linspace(0.5, 2, 96, dtype=np.float32)
COLUMNS = {"in order": {}, "in another order": {"column_order": ORDER}, "scaled": {"column_scale": SMOOTH},
           "scaled, in another order": {"column_order": ORDER, "column_scale": SMOOTH}}


def rounding(kind: str, scale: float, column_order=None, column_scale=None):
    """fp64: what a product with a matrix makes of its input. A column's factor is part of the rounded input."""
    def rule(values: np.ndarray) -> np.ndarray:
        factor = np.ones(96) if column_scale is None else column_scale.astype(np.float64)
        order = np.arange(96) if column_order is None else column_order
        near = RULES[kind]((values * factor).astype(np.float32)[..., order], scale)
        back = np.empty_like(near)
        back[..., order] = near
        return back / factor

    return rule


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(("form", "scale"), [("FP8, one scale", 2.0**-7), ("FP8, a scale a row", 2.0**-8),
                                             ("FP8, powers of two", 2.0**-9),
                                             ("NVFP4", 2.0**-9)])
def test_a_product_reads_its_input_rounded(form: str, scale: float, columns: str, tmp_path: Path) -> None:
    """By scales that are powers of two: others may move a value over a tie. The smallest saturates: 448 / 512 < 1."""
    kind, block, fields = NUMBERS[form]
    fields = {**fields, **COLUMNS[columns]}
    matrix = numbers(0, (40, 96), kind, block, **fields)
    codes = InputCodes(kind, scale)
    got, wanted, ops, context = run({"w": matrix}, "trt-native", tmp_path, inputs={"w": codes},
                                    round_inputs=rounding(kind, scale, **COLUMNS[columns]))
    close(got, wanted)
    assert context.held["w"].inputs == codes
    assert ops.count("QuantizeLinear" if kind == "e4m3" else "TRT_FP4DynamicQuantize") == 1
    plain, _, _, _ = run({"w": matrix}, "trt-native", tmp_path)
    assert np.abs(plain - wanted).max() > 1e-3 * np.abs(wanted).max()


def lowered(element: int, inputs: dict[str, InputCodes], names: tuple[str, ...] = ("a", "b")) -> onnx.ModelProto:
    """Products of one input with several matrices, as a TensorRT target has them."""
    kind, block, fields = NUMBERS["NVFP4" if "e2m1" in {codes.kind for codes in inputs.values()} else "FP8, one scale"]
    facts = {name: facts_of(numbers(0, (40, 96), kind, block, **fields)) for name in names}
    nodes, weights = [], []
    for name in names:
        weights.append(TensorProto(name=name, dims=[40, 96], data_type=element, data_location=TensorProto.EXTERNAL))
        weights[-1].external_data.add(key="location", value=f"weights:{name}")
        nodes += [onnx.helper.make_node("Transpose", [name], [f"{name}t"], f"{name}/Transpose_0", perm=[1, 0]),
                  onnx.helper.make_node("MatMul", ["x", f"{name}t"], [f"{name}y"], f"{name}/MatMul_0")]
    nodes.append(onnx.helper.make_node("Sum", [f"{name}y" for name in names], ["logits"], "sum"))
    values = [onnx.helper.make_tensor_value_info(name, element, ["b", "s", size])
              for name, size in (("x", 96), ("logits", 40))]
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
    context = Context(SPEC, get_target("trt-native"), LowerOptions("trt-native", quantized=facts, inputs=inputs), model)
    loaded = edit.load(model)
    run_passes(loaded, PASSES, context)
    return edit.save(loaded)


@pytest.mark.parametrize(("kind", "other"), [("e4m3", 0.5), ("e4m3", 0.25), ("e2m1", 0.5), ("e2m1", 0.25)])
def test_products_of_one_input_and_scale_share_what_rounds_it(kind: str, other: float) -> None:
    inputs = {"a": InputCodes(kind, 0.5), "b": InputCodes(kind, other)}
    model = lowered(TensorProto.FLOAT16, inputs)
    makers = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "TRT_FP4DynamicQuantize")]
    assert len(makers) == (1 if other == 0.5 else 2)
    assert inputs_in(model) == {name: {codes} for name, codes in inputs.items()}
    assert rounds_inputs(model.graph)


def test_a_product_without_a_scale_beside_one_with() -> None:
    model = lowered(TensorProto.FLOAT, {"b": InputCodes("e4m3", 0.5)})
    assert inputs_in(model) == {"a": {None}, "b": {InputCodes("e4m3", 0.5)}}
    assert bypass_inputs(model.graph) == 1
    assert inputs_in(model) == {"a": {None}, "b": {None}}
    assert not rounds_inputs(model.graph)


@pytest.mark.parametrize("kind", ["e4m3", "e2m1"])
@pytest.mark.parametrize("element", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT])
def test_scales_have_a_type_that_tensorrt_reads(kind: str, element: int) -> None:
    """TensorRT for RTX refuses others: those of FP8 have the type of the weight's scales."""
    inputs = {"a": InputCodes(kind, 0.5), "b": InputCodes(kind, 0.5)}
    model = lowered(element, inputs)
    (scale,) = [tensor for tensor in model.graph.initializer if tensor.name.endswith("/input/scale")]
    assert scale.data_type == (element if kind == "e2m1" else TensorProto.FLOAT)
    assert inputs_in(model) == {name: {codes} for name, codes in inputs.items()}
    assert bypass_inputs(model.graph) == 1
    assert {node.input[0] for node in model.graph.node if node.op_type == "MatMul"} == {"x"}
    assert ("trt" in {entry.domain for entry in model.opset_import}) == (kind == "e2m1")


def node_of(model: onnx.ModelProto, label: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name.endswith(f"/input/{label}"))


def constant_of(model: onnx.ModelProto, label: str) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name.endswith(f"/input/{label}"))


def attribute(label: str, name: str, value: int):
    """One attribute of one node has another value, or is new."""
    def change(model: onnx.ModelProto) -> None:
        node = node_of(model, label)
        kept = [each for each in node.attribute if each.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])
    return change


def constant(label: str, **fields):
    def change(model: onnx.ModelProto) -> None:
        constant_of(model, label).CopyFrom(TensorProto(name=constant_of(model, label).name, **fields))
    return change


def read_again(model: onnx.ModelProto) -> None:
    model.graph.node.append(onnx.helper.make_node("Identity", [node_of(model, "codes").output[1]], ["again"], "again"))


def other_operator(model: onnx.ModelProto) -> None:
    node_of(model, "steps").op_type = "Mul"


E5M2 = TensorProto.FLOAT8E5M2
WRONG_NVFP4 = {
    "block_size": attribute("codes", "block_size", 32), "axis": attribute("codes", "axis", 0),
    "scale_type": attribute("codes", "scale_type", TensorProto.FLOAT16),
    "block_size of numbers": attribute("numbers", "block_size", 8), "axis of numbers": attribute("numbers", "axis", 0),
    "block_size of steps": attribute("steps", "block_size", 16), "steps": other_operator,
    "inputs": lambda model: node_of(model, "codes").input.append("x")}
WRONG_FP8 = {
    "e5m2": constant("zero", data_type=E5M2, raw_data=b"\0"), "zero": constant("zero", data_type=17, raw_data=b"8"),
    "no zero": lambda model: node_of(model, "codes").input.pop(),
    "one input": lambda model: node_of(model, "codes").input.__delitem__(slice(1, None)),
    "saturate": attribute("codes", "saturate", 0), "block_size": attribute("codes", "block_size", 8),
    "output_dtype": attribute("codes", "output_dtype", E5M2), "axis": attribute("numbers", "axis", 0),
    "from integers": attribute("wide", "to", TensorProto.INT32),
    "text": constant("scale", data_type=TensorProto.STRING, string_data=[b"x"]),
    "no bytes": constant("scale", data_type=TensorProto.FLOAT),
    "two scales": constant("scale", data_type=TensorProto.FLOAT, dims=[2], float_data=[0.5, 0.5])}
STATED = {kind: Quantization("keep", "same", tuple(
    QuantizedWeight(name, "FP8", 8, 96, True, "DequantizeLinear", 0, inputs=kind, input_scale=0.5) for name in "ab"))
          for kind in RULES}
"""kind -> what a manifest says of a graph of `lowered`"""
CASES = [*(("e2m1", name) for name in WRONG_NVFP4), *(("e4m3", name) for name in WRONG_FP8)]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_inputs_that_are_rounded_as_no_export_does_it_are_refused(kind: str, name: str) -> None:
    """No program on a CPU reads what a node of TensorRT's own has beside its scale: only the claims can tell."""
    model = lowered(TensorProto.FLOAT16, {"a": InputCodes(kind, 0.5), "b": InputCodes(kind, 0.5)})
    before = onnx.ModelProto.FromString(model.SerializeToString())
    check_inputs(model, STATED[kind], "here")
    {"e2m1": WRONG_NVFP4, "e4m3": WRONG_FP8}[kind][name](model)
    assert model != before
    with refused("E-BUNDLE-CLAIM", InvalidBundle):
        check_inputs(model, STATED[kind], "here")


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("weight", ["plain", "activation"])
def test_a_rounded_input_of_a_product_without_codes_is_refused(kind: str, weight: str) -> None:
    """No weight of the manifest answers for it. Without roundings the graph is right, and with them the baseline's own
    are as large: no number tells."""
    model = lowered(TensorProto.FLOAT16, {"a": InputCodes(kind, 0.5), "b": InputCodes(kind, 0.5)})
    alone = Quantization("keep", "same", STATED[kind].weights[:1])
    product = next(node for node in model.graph.node if node.op_type == "MatMul" and node.name.startswith("b/"))
    product.input[1] = "head" if weight == "plain" else "x"
    if weight == "plain":
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((96, 40), np.float16), "head"))
    with refused("E-BUNDLE-CLAIM", InvalidBundle) as refusal:
        check_inputs(model, alone, "here")
    assert f"products with {product.input[1]} round their inputs to {kind}" in refusal.error.what
    product.input[0] = "x"
    check_inputs(model, alone, "here")


@pytest.mark.parametrize("change", [read_again, WRONG_NVFP4["block_size"], WRONG_NVFP4["axis of numbers"]])
def test_what_rounds_to_nvfp4_otherwise_is_not_interpreted(change) -> None:
    """A function takes the place of three nodes: it means these three alone, and only where nothing else reads them."""
    model = lowered(TensorProto.FLOAT, {"a": InputCodes("e2m1", 0.5)})
    change(model)
    with refused("E-BUNDLE-CLAIM", InvalidBundle):
        interpret_fp4_inputs(model)
