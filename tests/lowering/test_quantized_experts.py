"""Stacked experts in a graph: what ONNX Runtime computes is, for every row, the product with the dequantized matrix of
the expert that was chosen for it, for every form of a matrix and in each way in which models reach experts.
accuracy_level is 0 here."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from gqa_export.graph import edit
from gqa_export.graph.passes import run_passes
from gqa_export.lowering.context import Context, LowerOptions
from gqa_export.lowering.quantized.passes import PASSES
from gqa_export.quantized.facts import facts_of
from gqa_export.quantized.matrix import QuantizedMatrix
from gqa_export.quantizing.matrices import weights_of
from gqa_export.targets import get_target
from gqa_export.weights.packed import add_packed
from gqa_export.weights.sources import WeightStore

from .packed_model import write_packed
from .test_quantized import ORDER, SPEC, close, made

EXPERTS, ROWS, COLUMNS = 5, 24, 96


def stack(seed: int = 0, transposed: bool = False, **fields: object) -> QuantizedMatrix:
    """Experts of random codes."""
    whole = made(seed, EXPERTS * ROWS, COLUMNS, **fields)
    return replace(whole, shape=(EXPERTS, ROWS, COLUMNS), transposed=transposed)


def constant(name: str, *values: int) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def graph_of(way: str, shape: tuple[int, ...]) -> onnx.ModelProto:
    """A product with experts "w" as transformers' `batched_mm` has it ("rows", "columns" for `[K, N]`), as loops over
    experts are rewritten ("choices", "flat": one below the other), or with all ("all")."""
    weight = TensorProto(name="w", dims=shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="weights:w")
    node = helper.make_node
    x = [EXPERTS, "t", COLUMNS] if way == "all" else ["t", 2, COLUMNS] if way in ("choices", "flat") else ["p", COLUMNS]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)]
    constants = [constant("last", -1), constant("middle", -2), constant("stack", -1, ROWS, COLUMNS)]
    nodes, experts = [], "w"
    if way == "flat":
        nodes, experts = [node("Reshape", ["w", "stack"], ["ws"], "a/Reshape_0")], "ws"
    if way == "all":
        nodes += [node("MatMul", ["x", experts], ["logits"], "a/MatMul_0")]
    else:
        inputs.append(helper.make_tensor_value_info("ids", TensorProto.INT64, x[:-1]))
        sides = ["xs", "g"] if way == "columns" else ["g", "xs"]
        axis = "middle" if way == "columns" else "last"
        nodes += [node("Unsqueeze", ["ids", "last"], ["i"], "a/Unsqueeze_0"),
                  node("GatherND", [experts, "i"], ["g"], "a/GatherND_0"),
                  node("Unsqueeze", ["x", axis], ["xs"], "a/Unsqueeze_1"),
                  node("MatMul", sides, ["y"], "a/MatMul_0"),
                  node("Squeeze", ["y", axis], ["logits"], "a/Squeeze_0")]
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*x[:-1], ROWS])
    graph = helper.make_graph(nodes, "g", inputs, [out], [weight, *constants])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23),
                                                   helper.make_opsetid("com.microsoft", 1)], ir_version=10)


def run(matrix: QuantizedMatrix, way: str, target: str, folder: Path, rows: int = 12,
        ids: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, list[str], Context]:
    """The product: computed, in float64, the graph's operators, what the passes noted."""
    shape = (EXPERTS * ROWS, COLUMNS) if way == "flat" else matrix.parameter_shape
    model = graph_of(way, shape)
    (weight,) = [each for each in weights_of(model) if each.name == "w"]
    assert (weight.role, weight.experts, weight.matrix_shape) == ("experts", EXPERTS, matrix.shape)
    context = Context(SPEC, get_target(target), LowerOptions(target, quantized={"w": facts_of(matrix)}, exact=True),
                      model)
    loaded = edit.load(model)
    run_passes(loaded, PASSES, context)
    lowered = edit.save(loaded)
    write_packed(lowered, matrix, context, folder)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(folder / "m.onnx", options, providers=["CPUExecutionProvider"])
    rng, dense = np.random.default_rng(1), matrix.dequantize().reshape(matrix.shape)
    before = (EXPERTS, rows) if way == "all" else (rows // 2, 2) if way in ("choices", "flat") else (rows,)
    values = rng.standard_normal((*before, COLUMNS)).astype(np.float32)
    if way == "all":
        wanted = np.einsum("etk,enk->etn", values.astype(np.float64), dense)
        return session.run(None, {"x": values})[0], wanted, [node.op_type for node in lowered.graph.node], context
    # expert 2 is chosen by no row
    ids = rng.choice([0, 1, 3, 4], before) if ids is None else ids
    wanted = np.einsum("...k,...nk->...n", values.astype(np.float64), dense[ids])
    got = session.run(None, {"x": values, "ids": ids})[0]
    return got, wanted, [node.op_type for node in lowered.graph.node], context


FORMS = {"4 bits": {}, "zero points of 8": {"bits": 8, "offset": "zero"},
         "minimum": {"offset": "minimum", "half": True},
         "e2m1": {"kind": "e2m1", "block": 32}, "blocks that are not full": {"bits": 8, "block": 64},
         "ordered columns": {"column_order": ORDER, "offset": "minimum"}}


@pytest.mark.parametrize("target", ["ort", "onnx"])
@pytest.mark.parametrize("form", FORMS)
def test_each_row_meets_its_own_expert(form: str, target: str, tmp_path: Path) -> None:
    got, wanted, ops, context = run(stack(**FORMS[form]), "rows", target, tmp_path)
    close(got, wanted)
    if form == "blocks that are not full" and target == "onnx":
        assert "blocks of 64 of 96" in context.held["w"].reason
        return
    assert ops.count("MatMulNBits" if target == "ort" else "DequantizeLinear") == EXPERTS
    assert "GatherND" not in ops
    assert set(context.held) == {"w"}


@pytest.mark.parametrize("target", ["ort", "onnx", "portable"])
@pytest.mark.parametrize("way", ["columns", "choices", "flat", "all"])
def test_experts_are_held_however_they_are_reached(way: str, target: str, tmp_path: Path) -> None:
    got, wanted, ops, _ = run(stack(transposed=way in ("columns", "all")), way, target, tmp_path)
    close(got, wanted)
    assert ops.count("MatMulNBits" if target == "ort" else "DequantizeLinear") == EXPERTS


@pytest.mark.parametrize("ids", [[4] * 6, [0], []])
def test_one_expert_may_have_all_rows(ids: list[int], tmp_path: Path) -> None:
    """As in a decode step, and where there is nothing to do."""
    got, wanted, _, _ = run(stack(offset="minimum"), "rows", "ort", tmp_path, len(ids), np.array(ids, np.int64))
    assert got.shape == wanted.shape
    if ids:
        close(got, wanted)


@pytest.mark.parametrize(("matrix", "target", "reason"), [
    (stack(), "trt-native", "TensorRT"), (stack(transposed=True), "ort", "along the rows"),
    (stack(block=48), "onnx", ""), (stack(bits=8, block=12), "ort", "blocks of 12")])
def test_what_cannot_be_held_is_floating_point_numbers_with_a_reason(matrix: QuantizedMatrix, target: str,
                                                                     reason: str, tmp_path: Path) -> None:
    model = graph_of("rows", (EXPERTS, ROWS, COLUMNS))
    context = Context(SPEC, get_target(target), LowerOptions(target, quantized={"w": facts_of(matrix)}), model)
    loaded = edit.load(model)
    run_passes(loaded, PASSES, context)
    held = context.held["w"]
    assert bool(held.forms) == (not reason)
    assert reason in held.reason
    assert ("GatherND" in [node.op for node in loaded.nodes]) == bool(reason)


def product_with_all(x: list[int | str], made: list[int] | None = None) -> onnx.ModelProto:
    """x times a stack, x reshaped to `made` before if that is given."""
    model = graph_of("all", (EXPERTS, COLUMNS, ROWS))
    graph = model.graph
    graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, x))
    graph.output[0].CopyFrom(helper.make_empty_tensor_value_info("logits"))
    graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    if made is not None:
        graph.initializer.append(constant("made", *made))
        graph.node[0].input[0] = "reshaped"
        graph.node.insert(0, helper.make_node("Reshape", ["x", "made"], ["reshaped"], "a/Reshape_0"))
    return model


def lowered_ops(model: onnx.ModelProto, target: str) -> tuple[list[str], str]:
    """Operators of the lowered graph, and why the stack is not held as codes."""
    options = LowerOptions(target, quantized={"w": facts_of(stack(transposed=True))})
    context = Context(SPEC, get_target(target), options, model)
    loaded = edit.load(model)
    run_passes(loaded, PASSES, context)
    return [node.op for node in loaded.nodes], context.held["w"].reason


@pytest.mark.parametrize("target", ["ort", "onnx"])
@pytest.mark.parametrize("x", [[EXPERTS, EXPERTS, 7, COLUMNS], [EXPERTS, COLUMNS], [4, COLUMNS],
                               [1, EXPERTS, 7, COLUMNS], [1, 7, COLUMNS], ["e", 7, COLUMNS], [1, EXPERTS, COLUMNS]])
def test_a_product_that_repeats_its_input_for_experts_stays_as_it_is(x: list[int | str], target: str) -> None:
    """Split along its first axis, it would be another product: for `[5, 5, 7, K]` and five experts a silent one."""
    ops, reason = lowered_ops(product_with_all(x), target)
    assert ops == ["MatMul"]
    assert "not known to be rows of each expert, [5, rows, columns]" in reason


@pytest.mark.parametrize(("x", "made"), [([EXPERTS, "t", COLUMNS], None), (["t", COLUMNS], [EXPERTS, -1, COLUMNS])])
def test_rows_of_each_expert_are_known_by_what_makes_them(x: list[int | str], made: list[int] | None) -> None:
    ops, reason = lowered_ops(product_with_all(x, made), "onnx")
    assert ops.count("DequantizeLinear") == EXPERTS
    assert reason == ""


@pytest.mark.parametrize(("way", "x"), [("rows", [3, "p", COLUMNS]), ("rows", [1, COLUMNS]),
                                        ("choices", [4, "t", 2, COLUMNS])])
def test_rows_that_are_not_one_for_each_index_stay_as_they_are(way: str, x: list[int | str]) -> None:
    model = graph_of(way, (EXPERTS, ROWS, COLUMNS))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, x))
    context = Context(SPEC, get_target("ort"), LowerOptions("ort", quantized={"w": facts_of(stack())}), model)
    loaded = edit.load(model)
    run_passes(loaded, PASSES, context)
    assert "do not multiply one row each" in context.held["w"].reason
    assert "GatherND" in [node.op for node in loaded.nodes]


def test_an_expert_is_as_many_bytes_as_its_part_of_the_stack() -> None:
    matrix = stack(offset="minimum", half=True)
    context = Context(SPEC, get_target("ort"), LowerOptions("ort", quantized={"w": facts_of(matrix)}),
                      graph_of("rows", matrix.shape))
    run_passes(edit.load(context.model), PASSES, context)
    store = WeightStore({})
    add_packed(store, {"w": matrix}, {"w": context.held["w"].parts})
    sizes = {name: sum(chunk.nbytes for chunk in source.chunks()) for name, source in store.sources.items()}
    # codes of 4 bits, a scale and a minimum of 16 bits for each 32 columns
    assert sum(sizes.values()) == math.prod(matrix.shape) * (4 + 2 * 16 / 32) / 8
    assert len(sizes) == 3 * EXPERTS
