"""Quantized weights in a graph: what ONNX Runtime computes is the product with the dequantized matrix, for every form
of a matrix, on every target. accuracy_level is 0 here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from refusal import refused

from gqa_export.errors import InvalidCheckpoint
from gqa_export.graph import edit
from gqa_export.graph.passes import run_passes
from gqa_export.lowering.context import Context, LowerOptions
from gqa_export.lowering.quantized.passes import PASSES
from gqa_export.lowering.tensorrt.interpret import interpret
from gqa_export.quantized.facts import Form, facts_of, float_form
from gqa_export.quantized.input_codes import InputCodes
from gqa_export.quantized.matrix import LEVELS, QuantizedMatrix, Stripe
from gqa_export.quantized.packed_bits import packed
from gqa_export.spec import ModelSpec
from gqa_export.targets import get_target
from gqa_export.weights.packed import add_packed
from gqa_export.weights.source_kinds import DequantizedSource, PackedSource
from gqa_export.weights.sources import WeightStore

SPEC = ModelSpec("x", "", 5, 6, 8, "", ())
NUMPY = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}


def made(seed: int, rows: int, columns: int, bits: int = 4, block: int = 32, kind: str = "int", offset: str = "none",
         half: bool = False, signs: tuple[int, ...] = (-1, 1), **fields: object) -> QuantizedMatrix:
    """A matrix of random codes, scales and offsets. signs: of the scales."""
    rng, blocks = np.random.default_rng(seed), -(-columns // block)
    low = -(1 << (bits - 1)) if kind == "int" and offset == "none" else 0
    codes = rng.integers(low, low + (1 << bits), (rows, columns)).astype(np.int8 if low else np.uint8)
    scale = rng.choice(signs, (rows, blocks)) * rng.uniform(0.01, 0.1, (rows, blocks))
    zero = rng.integers(0, 1 << bits, (rows, blocks)) if offset == "zero" else None
    minimum = rng.uniform(-0.5, 0.5, (rows, blocks)) if offset == "minimum" else None
    scale, minimum = (None if each is None else each.astype(np.float16 if half else np.float32).astype(np.float32)
                      for each in (scale, minimum))
    whole = Stripe(codes, scale, zero, minimum)
    return QuantizedMatrix((rows, columns), bits, block, kind, offset, "test", lambda a, b: whole.rows(slice(a, b)),
                           scale_dtype="float16" if half else "float32", **fields)


def run(matrices: dict[str, QuantizedMatrix], target: str, folder: Path, element: int = TensorProto.FLOAT,
        lookup: bool = False, mean: float = 0.0, inputs: dict[str, InputCodes] | None = None,
        round_inputs: Callable[[np.ndarray], np.ndarray] = np.asarray
        ) -> tuple[np.ndarray, np.ndarray, list[str], Context]:
    """The product (or, added to it, the looked-up rows) with the matrices one below the other: computed, in float64 of
    inputs rounded by `round_inputs`, the graph's operators, what the pass noted."""
    rows, columns = sum(each.rows for each in matrices.values()), next(iter(matrices.values())).columns
    weight = TensorProto(name="w", dims=[rows, columns], data_type=element, data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="weights:" + "+".join(matrices))
    x = helper.make_tensor_value_info("x", element, ["b", "s", columns])
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "s"])
    out = helper.make_tensor_value_info("logits", element, ["b", "s", rows])
    if target == "ort":
        nodes = [helper.make_node("FusedMatMul", ["x", "w"], ["y"], "a/FusedMatMul_0", domain="com.microsoft",
                                  transB=1)]
    else:
        nodes = [helper.make_node("Transpose", ["w"], ["wt"], "a/Transpose_0", perm=[1, 0]),
                 helper.make_node("MatMul", ["x", "wt"], ["y"], "a/MatMul_0")]
    if lookup:
        nodes += [helper.make_node("Gather", ["w", "ids"], ["e"], "e/Gather_0"),
                  helper.make_node("ReduceSum", ["e"], ["r"], "e/ReduceSum_0"),
                  helper.make_node("Add", ["y", "r"], ["logits"], "a/Add_0")]
    else:
        nodes += [helper.make_node("Identity", ["y"], ["logits"], "a/Identity_0")]
    graph = helper.make_graph(nodes, "g", [x, *([ids] if lookup else [])], [out], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23),
                                                    helper.make_opsetid("com.microsoft", 1)], ir_version=10)
    facts = {name: facts_of(matrix) for name, matrix in matrices.items()}
    options = LowerOptions(target, quantized=facts, exact=True, inputs=inputs or {})
    context = Context(SPEC, get_target(target), options, model)
    loaded = edit.load(model)
    run_passes(loaded, PASSES, context)
    lowered = edit.save(loaded)
    operators = [node.op_type for node in lowered.graph.node]
    store = WeightStore({name: DequantizedSource(matrix) for name, matrix in matrices.items()})
    add_packed(store, matrices, {name: held.parts for name, held in context.held.items()})
    with open(folder / "data", "wb") as file:
        for tensor in lowered.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                write_part(tensor, store, file)
    interpret(lowered)
    onnx.save(lowered, folder / "m.onnx")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(folder / "m.onnx", options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    values = (mean + rng.standard_normal((2, 3, columns))).astype(NUMPY[element])
    places = rng.integers(0, rows, (2, 3))
    got = session.run(None, {"x": values, **({"ids": places} if lookup else {})})[0]
    dense = np.concatenate([each.dequantize() for each in matrices.values()])
    wanted = round_inputs(values).astype(np.float64) @ dense.T + (dense[places].sum() if lookup else 0)
    return got, wanted, operators, context


def write_part(tensor: TensorProto, store: WeightStore, file) -> None:
    from gqa_export.weights.dtypes import cast

    start = file.tell()
    wanted = helper.tensor_dtype_to_np_dtype(tensor.data_type).name
    for source in store.sources_of(tensor.external_data[0].value):
        for chunk in source.chunks():
            file.write(cast(chunk, source.dtype, wanted, tensor.name))
    del tensor.external_data[:]
    for key, value in (("location", "data"), ("offset", start), ("length", file.tell() - start)):
        tensor.external_data.add(key=key, value=str(value))


def close(got: np.ndarray, wanted: np.ndarray, bound: float = 3e-6) -> None:
    """bound: the rounding of fp32 sums over K, relative to the largest number."""
    assert np.abs(got - wanted).max() <= bound * np.abs(wanted).max()


ORDER = np.random.default_rng(3).permutation(96).astype(np.int32)
FORMS = {
    "4 bits": {}, "8 bits": {"bits": 8}, "2 bits": {"bits": 2}, "3 bits": {"bits": 3}, "5 bits": {"bits": 5},
    "6 bits of 16": {"bits": 6, "block": 16}, "zero points": {"offset": "zero"},
    "zero points 8": {"bits": 8, "offset": "zero"}, "zero points 3": {"bits": 3, "offset": "zero", "block": 16},
    "minimum": {"offset": "minimum"}, "minimum of float16": {"offset": "minimum", "half": True},
    "minimum of 5 bits": {"bits": 5, "offset": "minimum", "half": True}, "minimum of 2": {"bits": 2, "block": 16,
                                                                                         "offset": "minimum"},
    "float16 scales": {"half": True}, "a scale a row": {"bits": 8, "block": 96}, "blocks of 48": {"block": 48},
    "e2m1": {"kind": "e2m1", "block": 16}, "second scale": {"kind": "e2m1", "block": 16, "global_scale": 0.37},
    "ordered columns": {"column_order": ORDER, "offset": "minimum"},
    "scaled columns": {"column_scale": np.linspace(0.5, 2, 96, dtype=np.float32), "column_order": ORDER},
}


@pytest.mark.parametrize("target", ["ort", "onnx", "trt-native"])
@pytest.mark.parametrize("form", FORMS)
def test_a_product_is_that_of_the_dequantized_matrix(form: str, target: str, tmp_path: Path) -> None:
    signs = (1,) if target == "trt-native" else (-1, 1)  # of eight bits; negative ones there have a test of their own
    got, wanted, ops, context = run({"w": made(0, 40, 96, **FORMS[form], signs=signs)}, target, tmp_path)
    close(got, wanted)
    assert ops.count("MatMulNBits" if target == "ort" else "DequantizeLinear") == 1
    assert not context.held["w"].reason


@pytest.mark.parametrize("target", ["ort", "onnx", "trt-native"])
@pytest.mark.parametrize("fields", [{"bits": 5, "offset": "minimum", "half": True}, {"bits": 5, "offset": "zero"},
                                    {"bits": 3, "block": 16, "offset": "minimum"}])
def test_codes_of_few_bits_lie_around_the_middle_of_their_own(target: str, fields: dict, tmp_path: Path) -> None:
    """Around that of the eight bits that hold them, products cancel three bits of the sum where inputs have a mean."""
    matrix = made(0, 40, 96, **fields, signs=(1,))
    whole = matrix.stripe()
    around = replace(whole, minimum=-whole.scale * (1 << (matrix.bits - 1)) if whole.minimum is not None else None)
    even = replace(matrix, read=lambda a, b: around.rows(slice(a, b)))
    got, wanted, ops, _ = run({"w": even}, target, tmp_path, mean=100.0)
    close(got, wanted, 1e-6)
    assert ops.count("ReduceSum") == (0 if target != "trt-native" and fields["offset"] == "zero" else 1)


@pytest.mark.parametrize("fields", [{"bits": 8, "block": 200}, {"bits": 4, "block": 32, "offset": "minimum"},
                                    {"bits": 4, "block": 32, "offset": "zero"}, {"bits": 2, "block": 64}])
def test_rows_that_are_not_whole_blocks(fields: dict, tmp_path: Path) -> None:
    got, wanted, ops, _ = run({"w": made(0, 63, 200, **fields)}, "ort", tmp_path)
    close(got, wanted)
    assert "MatMulNBits" in ops


@pytest.mark.parametrize(("kind", "block"), [("nf4", 64), ("fp4", 32)])
def test_codebooks_of_four_bits_are_bitsandbytes_operator(kind: str, block: int, tmp_path: Path) -> None:
    got, wanted, ops, _ = run({"w": made(0, 40, 128, kind=kind, block=block)}, "ort", tmp_path)
    close(got, wanted)
    assert "MatMulBnb4" in ops
    assert len(LEVELS[kind]) == 16


def test_zero_points_beyond_the_codes_become_shifts(tmp_path: Path) -> None:
    """GPTQ stores zero points minus one: 15 means 16, which four bits do not hold."""
    matrix = made(0, 40, 96, offset="zero")
    whole = matrix.stripe()
    beyond = replace(matrix, read=lambda a, b: replace(whole, zero=np.full_like(whole.zero, 16)).rows(slice(a, b)))
    got, wanted, ops, _ = run({"w": beyond}, "ort", tmp_path)
    close(got, wanted)
    assert ops.count("ReduceSum") == 1


@pytest.mark.parametrize("offset", ["none", "zero", "minimum"])
def test_rows_of_several_matrices_are_one(offset: str, tmp_path: Path) -> None:
    matrices = {name: made(seed, rows, 96, offset=offset) for seed, (name, rows) in
                enumerate((("q", 32), ("k", 17), ("v", 5)))}
    got, wanted, ops, _ = run(matrices, "ort", tmp_path)
    close(got, wanted)
    assert ops.count("MatMulNBits") == 1


@pytest.mark.parametrize("fields", [{"bits": 8}, {}, {"offset": "zero"}, {"offset": "minimum"},
                                    {"bits": 8, "offset": "minimum", "half": True}, {"bits": 2, "block": 16}])
def test_a_tied_head_and_embedding_share_their_bytes(fields: dict, tmp_path: Path) -> None:
    matrix = made(0, 40, 96, **fields)
    got, wanted, ops, context = run({"w": matrix}, "ort", tmp_path, lookup=True)
    close(got, wanted)
    assert {"MatMulNBits", "GatherBlockQuantized"} < set(ops)
    codes = [part for form, part in context.held["w"].parts.values() if part == "codes"]
    assert len(codes) == 1
    assert len(context.held["w"].forms) == 2


@pytest.mark.parametrize("target", ["onnx", "trt-native"])
def test_lookups_of_standard_operators(target: str, tmp_path: Path) -> None:
    got, wanted, ops, _ = run({"w": made(0, 40, 96)}, target, tmp_path, lookup=True)
    close(got, wanted)
    assert ops.count("DequantizeLinear") == 1


def numbers(seed: int, shape: tuple[int, ...], kind: str, block: int, scale_dtype: str = "float32",
            row_block: int = 1, **fields: object) -> QuantizedMatrix:
    """A matrix whose codes are floating-point numbers: all of them, with scales of a type."""
    rng, rows, columns = np.random.default_rng(seed), int(np.prod(shape[:-1])), shape[-1]
    codes = rng.permuted(np.resize(np.arange(16 if kind == "e2m1" else 256), rows * columns)).astype(np.uint8)
    codes[codes & 127 == 127] = 0 if kind == "e4m3" else 127
    scale = rng.uniform(0.01, 0.1, (-(-rows // row_block), -(-columns // block)))
    if scale_dtype == "float8_e4m3fn":
        scale = LEVELS["e4m3"][rng.integers(1, 127, scale.shape)]
    elif scale_dtype == "bfloat16":
        scale = 2.0 ** rng.integers(-12, 3, scale.shape)
    scale = scale.astype(np.float16 if scale_dtype == "float16" else np.float32).astype(np.float32)
    whole = Stripe(codes.reshape(rows, columns), np.repeat(scale, row_block, axis=0)[:rows])
    return QuantizedMatrix(shape, 4 if kind == "e2m1" else 8, block, kind, "none", "test",
                           lambda a, b: whole.rows(slice(a, b)), scale_dtype=scale_dtype, row_block=row_block, **fields)


NUMBERS = {
    "FP8, one scale": ("e4m3", 96, {"row_block": 40}), "FP8, a scale a row": ("e4m3", 96, {}),
    "FP8, a float16 scale a row": ("e4m3", 96, {"scale_dtype": "float16"}),
    "FP8, rectangles that do not fill the matrix": ("e4m3", 64, {"row_block": 16}),
    "FP8, blocks of 128 in 96 columns": ("e4m3", 96, {"row_block": 128}),
    "FP8, powers of two": ("e4m3", 32, {"scale_dtype": "bfloat16"}),
    "FP8 with a second scale": ("e4m3", 96, {"global_scale": 0.37, "scale_dtype": "float16"}),
    "NVFP4": ("e2m1", 16, {"scale_dtype": "float8_e4m3fn", "global_scale": 3.7e-5}),
    "NVFP4 without a second scale": ("e2m1", 16, {"scale_dtype": "float8_e4m3fn"}),
    "e2m1 of one block": ("e2m1", 96, {"scale_dtype": "float8_e4m3fn", "global_scale": 0.5}),
    "MXFP4": ("e2m1", 32, {"scale_dtype": "bfloat16"}),
    "NVFP4, ordered columns": ("e2m1", 16, {"scale_dtype": "float8_e4m3fn", "column_order": ORDER}),
    "NVFP4, scaled columns": ("e2m1", 16, {"scale_dtype": "float8_e4m3fn",
                                           "column_scale": np.linspace(0.5, 2, 96, dtype=np.float32)}),
}


@pytest.mark.parametrize("form", NUMBERS)
def test_float8_and_float4_are_codes_for_tensorrt(form: str, tmp_path: Path) -> None:
    kind, block, fields = NUMBERS[form]
    got, wanted, ops, context = run({"w": numbers(0, (40, 96), kind, block, **fields)}, "trt-native", tmp_path)
    close(got, wanted)
    held = context.held["w"].forms[0]
    assert held.kind == kind
    assert ops.count("DequantizeLinear") == (2 if held.scales == "float8_e4m3fn" else 1)
    assert "Cast" not in ops or held.scales in ("float16", "bfloat16")


@pytest.mark.parametrize("form", [name for name in NUMBERS if "columns" not in name])
def test_float8_and_float4_are_looked_up(form: str, tmp_path: Path) -> None:
    kind, block, fields = NUMBERS[form]
    got, wanted, _, context = run({"w": numbers(0, (40, 96), kind, block, **fields)}, "trt-native", tmp_path,
                                  lookup=True)
    close(got, wanted)
    assert len(context.held["w"].forms) == 1  # the product and the lookup read one tensor


@pytest.mark.parametrize("form", ["8 bits", "5 bits", "minimum of 5 bits", "zero points 8", "a scale a row", "FP8",
                                  "MXFP4"])
def test_tensorrt_gets_scales_above_zero_for_eight_bits_and_floats(form: str, tmp_path: Path) -> None:
    """Its parser refuses others, of 4-bit integers aside: codes change their sign, and are 0 where the scale is."""
    matrix = numbers(0, (40, 96), "e4m3", 32) if form == "FP8" else numbers(0, (40, 96), "e2m1", 32) \
        if form == "MXFP4" else made(0, 40, 96, **FORMS[form])
    whole = matrix.stripe()
    scale = whole.scale * np.random.default_rng(1).choice([-1, 1], whole.scale.shape)
    scale[3:5] = 0
    least = -127 if whole.codes.dtype == np.int8 else 1 if matrix.kind == "int" and matrix.bits == 8 else 0
    codes = np.maximum(whole.codes, np.array(least, whole.codes.dtype))
    odd = replace(whole, scale=scale.astype(np.float32), codes=codes)
    odd_matrix = replace(matrix, read=lambda a, b: odd.rows(slice(a, b)))
    got, wanted, _, context = run({"w": odd_matrix}, "trt-native", tmp_path)
    close(got, wanted)
    model = onnx.load(tmp_path / "m.onnx")
    scales = [onnx.numpy_helper.to_array(each) for each in model.graph.initializer if each.name.endswith(".scale")]
    assert len(scales) == 1
    assert (scales[0] > 0).all()
    assert context.held["w"].forms[0].positive


def test_a_code_without_an_opposite_under_a_scale_below_zero_is_refused(tmp_path: Path) -> None:
    matrix = made(0, 40, 96, bits=8)
    whole = replace(matrix.stripe(), codes=np.full((40, 96), -128, np.int8), scale=np.full((40, 3), -0.1, np.float32))
    with refused("E-WEIGHTS-SIGN", InvalidCheckpoint):
        run({"w": replace(matrix, read=lambda a, b: whole.rows(slice(a, b)))}, "trt-native", tmp_path)


def test_a_last_block_that_is_not_full_is_cut_into_smaller_ones() -> None:
    """TensorRT-RTX 1.7 takes 200 columns with two scales for blocks of 100."""
    for columns, block, found in ((200, 128, 8), (576, 128, 64), (96, 128, 96), (512, 128, 128), (160, 128, 32)):
        form = float_form(facts_of(numbers(0, (8, columns), "e4m3", min(block, columns))))
        assert isinstance(form, Form)
        assert form.block == found
    assert isinstance(float_form(facts_of(numbers(0, (8, 132), "e4m3", 128))), str)


@pytest.mark.parametrize(("kind", "block", "fields"), [
    ("e2m1", 16, {"scale_dtype": "float8_e4m3fn", "global_scale": 2.0**-9}), ("e4m3", 96, {"scale_dtype": "float16"})])
def test_float8_and_float4_in_float16_graphs(kind: str, block: int, fields: dict, tmp_path: Path) -> None:
    got, wanted, _, _ = run({"w": numbers(0, (40, 96), kind, block, **fields)}, "trt-native", tmp_path,
                            TensorProto.FLOAT16)
    close(got, wanted, 2e-3)  # of float16: 2^-11, and the sums


def test_what_no_operator_holds_stays_numbers_and_is_said(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 120, (40, 96)).astype(np.uint8)
    whole = Stripe(codes, np.full((40, 1), 0.1, np.float32))
    matrix = QuantizedMatrix((40, 96), 8, 96, "e4m3", "none", "FP8", lambda a, b: whole.rows(slice(a, b)))
    got, wanted, ops, context = run({"w": matrix}, "ort", tmp_path)
    close(got, wanted)
    assert "MatMulNBits" not in ops
    assert "e4m3" in context.held["w"].reason


def test_matrices_of_different_forms_are_not_joined(tmp_path: Path) -> None:
    got, wanted, ops, context = run({"a": made(0, 8, 96), "b": made(1, 8, 96, bits=8)}, "ort", tmp_path)
    close(got, wanted)
    assert "MatMulNBits" not in ops
    assert all(held.reason for held in context.held.values())


def test_float16_graphs(tmp_path: Path) -> None:
    got, wanted, ops, _ = run({"w": made(0, 40, 96, half=True, offset="minimum")}, "ort", tmp_path,
                              TensorProto.FLOAT16)
    close(got, wanted, 2e-3)  # of float16: 2^-11, and the sum of two products
    assert "MatMulNBits" in ops
    assert "Cast" not in ops


def test_a_matrix_is_read_once() -> None:
    read: list[tuple[int, int]] = []
    matrix = made(0, 40, 96, offset="minimum")
    store = WeightStore({})
    counted = replace(matrix, read=lambda a, b: read.append((a, b)) or matrix.read(a, b))
    from gqa_export.quantized.facts import nbits_form
    form = nbits_form(facts_of(matrix))
    add_packed(store, {"w": counted}, {"w": {part: (form, part) for part in ("codes", "scale", "shift")}})
    sizes = [sum(chunk.nbytes for chunk in store.sources[part].chunks()) for part in ("codes", "scale", "shift")]
    assert read == [(0, 40)]
    assert sizes == [source.nbytes for source in store.sources.values() if isinstance(source, PackedSource)]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_low_bits_come_first(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (3, 16)).astype(np.uint8)
    bytes_ = packed(codes.copy(), bits)
    for row, place in np.ndindex(codes.shape):
        byte, shift = divmod(place * bits, 8)
        assert bytes_[row, byte] >> shift & ((1 << bits) - 1) == codes[row, place]
