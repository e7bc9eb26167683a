"""A cache of codes on target `trt-plugin`: the graph's nodes and tensors, what it computes where ONNX Runtime
interprets its nodes, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import kv_bundles
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.helper import get_attribute_value
from refusal import refused

import gqa_export as gqa
from gqa_export import attention_op
from gqa_export.bundle.attention_claims import check_claims
from gqa_export.bundle.manifest import MODEL, read_manifest
from gqa_export.errors import InvalidBundle, UnsupportedModel

pytestmark = pytest.mark.whole_model
TYPES = {"int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}
CODES = ["int8", "fp8"]


text, checkpoints, bundles = kv_bundles.text, kv_bundles.checkpoints, kv_bundles.bundles_of(target="trt-plugin")


def graph_of(folder: Path) -> onnx.GraphProto:
    return onnx.load(str(folder / MODEL), load_external_data=False).graph


def attributes(node: onnx.NodeProto) -> dict:
    return {each.name: get_attribute_value(each) for each in node.attribute}


@pytest.mark.parametrize("codes", CODES)
def test_nodes_are_of_version_3_with_the_scales_and_their_cache_tensors_are_codes(codes, bundles) -> None:
    bundle = bundles(codes=codes)
    graph, kv = graph_of(bundle.folder), bundle.manifest.kv_cache
    assert (kv.kind, len(kv.scales)) == (codes, 2)
    nodes = [node for node in graph.node if node.op_type == attention_op.OP]
    for node, scales in zip(nodes, kv.scales, strict=True):
        found = attributes(node)
        assert found["plugin_version"] == b"3"
        assert found["cache_codes"] == attention_op.CACHE_CODES[codes]
        assert (found["key_scale"], found["value_scale"]) == (np.float32(scales.key), np.float32(scales.value))
    cached = [value for value in (*graph.input, *graph.output) if "key" in value.name or "value" in value.name]
    assert len(cached) == 8
    assert {value.type.tensor_type.elem_type for value in cached} == {TYPES[codes]}
    assert {fact.dtype for fact in bundle.manifest.inputs if "past" in fact.name and "." in fact.name} == {kv.dtype}


@pytest.mark.parametrize(("name", "codes"), [("llama", "int8"), ("gpt_oss", "int8"), ("llama", "fp8")])
def test_the_graph_computes_the_rule_and_holds_equal_codes(name, codes, bundles, checkpoints) -> None:
    """Also with a window and sinks. A code more or less would be a thousand times as much as is allowed."""
    bundle = bundles(name, codes)
    verdict = bundle.validate(checkpoints(name), steps=4).check()
    assert {"new keys and values", "cache"} <= set(verdict.compared)
    for case in verdict.cases:
        for kind in case.kinds:
            if kind.kind in ("keys", "values", "cache"):
                assert kind.max_abs < 1e-5


def other_scale(graph: onnx.GraphProto) -> None:
    """The keys of layer 0 are written and read by a scale that is 1 % larger."""
    step = next(each for each in graph.initializer if each.name.endswith(".key_step"))
    step.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(step) * np.float32(1.01), step.name))


def scales_of_other_layers(graph: onnx.GraphProto) -> None:
    """The keys of each layer by the scale of the other's."""
    first, second = (each for each in graph.initializer if each.name.endswith(".key_step"))
    first.name, second.name = second.name, first.name


def larger_values(graph: onnx.GraphProto, factor: float) -> None:
    """Values of layer 0 are larger by this factor before they become codes."""
    graph.initializer.append(numpy_helper.from_array(np.array(factor, np.float32), "broken/factor"))
    place, node = next((place, node) for place, node in enumerate(graph.node)
                       if node.op_type == "QuantizeLinear" and ".value." in node.output[0])
    larger = onnx.helper.make_node("Mul", [node.input[0], "broken/factor"], ["broken/larger"])
    node.input[0] = "broken/larger"
    graph.node.insert(place, larger)


def neighbours(graph: onnx.GraphProto) -> None:
    """Codes of fp8 lie 6 to 12 % apart: more than half become the next one."""
    larger_values(graph, 1.0625)


def run_as(damage, monkeypatch) -> None:
    """Let the graph that is run compute something else than its nodes say, which the manifest agrees with."""
    from gqa_export.lowering.tensorrt import interpret

    whole = interpret.interpret

    def damaged(model: onnx.ModelProto) -> int:
        count = whole(model)
        damage(model.graph)
        return count

    monkeypatch.setattr(interpret, "interpret", damaged)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("damage", [other_scale, scales_of_other_layers, neighbours])
def test_another_scale_and_another_code_are_not_followed(damage, codes, bundles, checkpoints, monkeypatch) -> None:
    run_as(damage, monkeypatch)
    verdict = bundles(codes=codes).validate(checkpoints("llama"), steps=2)
    assert not verdict.passed
    assert verdict.first.output == ("layer 0 value" if damage is neighbours else "layer 0 key")


@pytest.mark.parametrize(("codes", "most"), [("int8", 127), ("fp8", 16)])
def test_either_of_two_codes_is_followed_at_a_near_tie(codes, most, bundles, checkpoints, monkeypatch) -> None:
    """What the order of a sum does to a few numbers in a long run, done to all here: each moves by 0.0009 of the
    distance between two codes at most, of which the largest code has so many. The codes of some become others."""
    run_as(lambda graph: larger_values(graph, 1 + 9e-4 / most), monkeypatch)
    verdict = bundles(codes=codes).validate(checkpoints("llama"), steps=4).check()
    assert all(kind.max_abs < 1e-5 for case in verdict.cases for kind in case.kinds
               if kind.kind in ("keys", "values", "cache"))


def changed(bundle: gqa.Bundle, folder: Path, edit) -> Path:
    """A copy whose nodes and manifest were changed alike, so that only a comparison can tell."""
    shutil.copytree(bundle.folder, folder)
    model = onnx.load(str(folder / MODEL), load_external_data=False)
    manifest = read_manifest(folder)
    for node in (node for node in model.graph.node if node.op_type == attention_op.OP):
        given = {each.name: each for each in node.attribute}
        given["key_scale"].f, given["value_scale"].f = edit(given["key_scale"].f, given["value_scale"].f)
    onnx.save(model, str(folder / MODEL))
    assert manifest.kv_cache is not None
    scales = tuple(replace(each, **dict(zip(("key", "value"), edit(each.key, each.value), strict=True)))
                   for each in manifest.kv_cache.scales)
    files = {**manifest.files, MODEL: replace(manifest.files[MODEL], size=(folder / MODEL).stat().st_size,
                                              sha256=gqa_sha256(folder / MODEL))}
    write_manifest(folder, replace(manifest, kv_cache=replace(manifest.kv_cache, scales=scales), files=files))
    return folder


def gqa_sha256(path: Path) -> str:
    from gqa_export.files.sha256 import file_sha256

    return file_sha256(path)


def write_manifest(folder: Path, manifest) -> None:
    from gqa_export.bundle.manifest import MANIFEST

    (folder / MANIFEST).write_text(manifest.to_json())


def test_scales_that_the_manifest_does_not_state_are_refused_by_layer_and_attribute(bundles, tmp_path) -> None:
    folder = changed(bundles(), tmp_path / "b", lambda key, value: (value, key))
    manifest = read_manifest(folder)
    check_claims(folder, manifest)
    with refused("E-BUNDLE-CLAIM", InvalidBundle) as found:
        check_claims(folder, replace(manifest, kv_cache=bundles().manifest.kv_cache))
    assert "layer 0: key_scale is" in found.error.what
    with refused("E-BUNDLE-CLAIM", InvalidBundle):
        check_claims(folder, replace(manifest, kv_cache=None))


@pytest.mark.parametrize(("option", "code"), [
    ({"tensor_parallel": 2}, "E-OPTION-TENSOR-PARALLEL"), ({"window_cache": "small"}, "E-OPTION-WINDOW-CACHE")])
def test_what_does_not_go_with_a_cache_of_codes_is_refused(option, code, checkpoints, text, tmp_path) -> None:
    with refused(code):
        gqa.export(checkpoints("llama"), tmp_path / "b", target="trt-plugin", kv_cache="int8", calibrate=text,
                   capacity=64, **option)
    assert not (tmp_path / "b").exists()


def test_what_a_target_lacks_is_refused_and_trt_native_names_trt_plugin(checkpoints, text, tmp_path) -> None:
    for target, codes, named in (("trt-plugin", "int4", "one code a byte"), ("trt-native", "int8", "trt-plugin"),
                                 ("trt-native", "fp8", "trt-plugin"), ("ort", "fp8", "fp8 codes")):
        with refused("E-TARGET-KV", UnsupportedModel) as found:
            gqa.export(checkpoints("llama"), tmp_path / "b", target=target, kv_cache=codes, calibrate=text, capacity=64)
        assert named in found.error.what
        assert codes != "fp8" or "--target trt-plugin" in found.error.fix
    with refused("E-OPTION-LONG-CODES"):
        gqa.export(checkpoints("llama"), tmp_path / "b", target="trt-plugin", kv_cache="int8", calibrate=text,
                   capacity=64, long_attention=gqa.LongOptions(layers=(0,)))
