"""The fp32 twin computes what the low-precision graph means, and reads and writes nothing it should not."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from refusal import refused

from gqa_export.bundle.manifest import DATA, MANIFEST, MODEL, FileFact, Manifest, read_manifest
from gqa_export.errors import InvalidBundle, NotCheckedHere
from gqa_export.graph_io import TensorFact
from gqa_export.spec import ModelSpec
from gqa_export.validation import fp32_twin as twin_module
from gqa_export.validation.fp32_twin import write_twin

NUMPY = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
ONNX = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def small_bundle(folder, dtype: str, *, weight=None, location: str = DATA):
    """y = If(x0 > 0, Cast(Cast(x, low), low) @ W + b, x * 2) with W external, b inline, constants of every kind."""
    low, kind = ONNX[dtype], NUMPY[dtype]
    weight = np.random.default_rng(1).normal(size=(6, 5)).astype(kind) if weight is None else weight
    ids = np.arange(40, dtype=np.int64)
    (folder / DATA).write_bytes(b"\1" * 8 + weight.tobytes() + ids.tobytes())

    def external(name, kind_, shape, offset, length):
        tensor = TensorProto(name=name, data_type=kind_, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def constant(name, values):
        array = np.asarray(values).astype(kind)
        tensor = TensorProto(name=name, data_type=low, dims=array.shape, raw_data=array.tobytes())
        return helper.make_node("Constant", [], [name], value=tensor)

    nodes_then = [helper.make_node("MatMul", ["lowx", "W"], ["xw"]), helper.make_node("Add", ["xw", "b"], ["then_y"])]
    nodes_else = [constant("two", 2.0), constant("five", np.ones((6, 5))),
                  helper.make_node("Mul", ["lowx", "two"], ["x2"]),
                  helper.make_node("MatMul", ["x2", "five"], ["else_y"])]
    branch = [helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{name}_y", low, [None, 5])])
              for name, nodes in (("then", nodes_then), ("else", nodes_else))]
    nodes = [
        helper.make_node("Cast", ["x"], ["lowx"], to=low),
        helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        helper.make_node("Greater", ["top", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["low_y"], then_branch=branch[0], else_branch=branch[1]),
        helper.make_node("Gather", ["low_y", "pick"], ["y"], axis=1),
    ]
    bias = np.arange(5).astype(kind)
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 6])],
        [helper.make_tensor_value_info("y", low, [None, 5])],
        initializer=[external("W", low, [6, 5], 8, weight.nbytes), numpy_helper.from_array(np.float32(0), "zero"),
                     TensorProto(name="b", data_type=low, dims=[5], raw_data=bias.tobytes()),
                     external("pick", TensorProto.INT64, [5], 8 + weight.nbytes, 40)],
        value_info=[helper.make_tensor_value_info("lowx", low, [None, 6])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, str(folder / MODEL))
    manifest = Manifest("ort", dtype, "growing", 8, "all", "copy", ModelSpec("x", "", 5, 6, 8, "", ()),
                        (TensorFact("x", "float32", ("n", 6)),), (TensorFact("y", dtype, ("n", 5)),),
                        files={DATA: FileFact((folder / DATA).stat().st_size)})
    (folder / MANIFEST).write_text(manifest.to_json())
    return weight, bias


def run(folder, x):
    import onnxruntime

    return onnxruntime.InferenceSession(str(folder / MODEL), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.fixture
def folders(tmp_path):
    source, target = tmp_path / "bundle", tmp_path / "twin"
    source.mkdir()
    target.mkdir()
    return source, target


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("block_bytes", [4, 1 << 24])
def test_the_twin_computes_in_fp32_with_the_rounded_weights(folders, dtype, block_bytes, monkeypatch):
    monkeypatch.setattr(twin_module, "BLOCK_BYTES", block_bytes)
    source, target = folders
    weight, bias = small_bundle(source, dtype)
    manifest = write_twin(source, target)
    x = np.random.default_rng(2).normal(size=(3, 6)).astype(np.float32)
    x[0, 0] = 3  # the largest is positive: the first branch
    y = run(target, x)
    assert y.dtype == np.float32
    wide = x.astype(np.float64) @ weight.astype(np.float64) + bias.astype(np.float64)
    # six products summed in fp32; x itself is no longer rounded to the low format
    assert np.abs(y - wide).max() <= 16 * 2.0**-24 * np.abs(wide).max()
    assert np.abs(run(target, -np.abs(x)) - 2 * -np.abs(x).astype(np.float64) @ np.ones((6, 5))).max() <= 1e-5
    assert manifest.dtype == "float32"
    assert manifest.outputs[0].dtype == "float32"
    assert read_manifest(target) == manifest


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_nothing_of_the_low_type_is_left(folders, dtype):
    source, target = folders
    small_bundle(source, dtype)
    write_twin(source, target)
    model = onnx.load(str(target / MODEL))
    onnx.checker.check_model(model, full_check=True)
    assert f"elem_type: {ONNX[dtype]}\n" not in str(model)
    assert f"data_type: {ONNX[dtype]}\n" not in str(model)
    assert all(a.i == TensorProto.FLOAT for node in model.graph.node if node.op_type == "Cast" for a in node.attribute)


def test_every_bit_pattern_is_widened_exactly(folders):
    patterns = np.arange(1 << 16, dtype=np.uint16)
    for dtype, kind in NUMPY.items():
        wide = np.frombuffer(twin_module._widen_bytes(patterns.tobytes(), ONNX[dtype]), np.float32)
        exact = patterns.view(kind).astype(np.float32)
        assert np.array_equal(wide, exact, equal_nan=True)


def test_an_fp32_bundle_has_no_twin(folders):
    source, target = folders
    small_bundle(source, "float16")
    (source / MANIFEST).write_text(replace(read_manifest(source), dtype="float32").to_json())
    with refused("E-OPTION-AS"):
        write_twin(source, target)


def test_data_outside_the_bundle_is_refused(folders):
    source, target = folders
    (source.parent / "secret").write_bytes(b"x" * 1000)
    small_bundle(source, "bfloat16", location="../secret")
    with refused("E-BUNDLE-OUTSIDE", InvalidBundle):
        write_twin(source, target)


def test_data_cut_short_is_refused(folders):
    source, target = folders
    small_bundle(source, "bfloat16")
    with open(source / DATA, "r+b") as file:
        file.truncate(20)
    with refused("E-BUNDLE-SHORT", InvalidBundle):
        write_twin(source, target)


def test_no_room_for_the_twin_is_not_a_pass(folders, monkeypatch):
    import collections

    source, target = folders
    small_bundle(source, "bfloat16")
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(twin_module.shutil, "disk_usage", lambda path: usage(10, 10, 0))
    with refused("E-VALIDATE-SPACE", NotCheckedHere) as refusal:
        write_twin(source, target)
    assert refusal.error.exit_code == 3
