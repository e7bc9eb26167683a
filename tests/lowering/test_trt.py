"""Targets `trt-plugin` and `trt-native`: what the graph looks like, what is refused, and that it is true (on a CPU)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from gqa_plugins.grouped_attention import fields
from onnx import helper
from refusal import refused
from shared_reference import reference_of

from gqa_export import attention_op, graph_io
from gqa_export.bundle.manifest import MANIFEST, read_manifest
from gqa_export.errors import InvalidBundle, NotCheckedHere, UnsupportedModel
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.lowering.tensorrt import interpret
from gqa_export.lowering.tensorrt.common import refuse_layers
from gqa_export.spec import AttentionSpec
from gqa_export.targets import TARGETS
from gqa_export.validation.validate import validate

from .trt_bundles import CAPACITY, bundle, changed, checkpoint, graph

pytestmark = pytest.mark.whole_model

STEPS = 6
ALL = [(name, "trt-plugin") for name in ("gemma2", "gemma3", "gpt_oss", "qwen2", "stablelm", "cohere", "smollm3",
                                         "llama_mha", "llama_mqa", "mistral")]
ALL += [(name, "trt-native") for name in ("gemma3", "phi3", "stablelm", "cohere", "smollm3", "llama_mha", "llama_mqa")]
"""every mechanism once a target (it has neither softcap nor sinks in `trt-native`); every family: tests/export"""
LOGITS = 1e-4
"""far above fp32's rounding on logits up to 20 (measured 3e-6 to 2e-5), far below what any wrong token gives (0.1)"""


def plugin_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == attention_op.OP]


def attributes(node: onnx.NodeProto) -> dict:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


@pytest.mark.parametrize(("name", "target"), ALL)
def test_graph_equals_pytorch_in_every_case_of_validate(name: str, target: str) -> None:
    reference = reference_of(checkpoint(name), read_manifest(bundle(name, target)))
    verdict = validate(bundle(name, target), checkpoint(name), steps=STEPS, reference=reference)
    assert verdict.passed, str(verdict.first)
    assert {"teacher_forced", "free_running", "ragged", "garbage_tail"} <= {case.name for case in verdict.cases}
    assert verdict.max_abs_logits < LOGITS


@pytest.mark.parametrize(("name", "target", "dtype"), [
    ("llama", "trt-plugin", "bf16"), ("llama", "trt-native", "fp16"), ("gpt_oss", "trt-plugin", "fp16"),
    ("gemma3", "trt-native", "bf16")])
def test_a_low_precision_graph_is_checked_as_its_fp32_twin_without_being_asked(name: str, target: str, dtype) -> None:
    verdict = validate(bundle(name, target, dtype), checkpoint(name), steps=STEPS)
    assert verdict.passed, str(verdict.first)
    assert (verdict.dtype, verdict.checked_dtype) == ({"fp16": "float16", "bf16": "bfloat16"}[dtype], "float32")
    assert verdict.max_abs_logits < LOGITS  # the truth has the same rounded weights


def test_the_verdict_says_that_no_engine_was_run() -> None:
    notes = validate(bundle("llama", "trt-plugin"), checkpoint("llama"), steps=2).notes
    assert any("3 plugin nodes interpreted" in note and "no TensorRT engine was built or run" in note
               for note in notes)


@pytest.mark.parametrize("target", ["trt-plugin", "trt-native"])
def test_inputs_are_int32_lengths_and_a_cache_of_literal_capacity(target: str) -> None:
    manifest, model = read_manifest(bundle("llama", target)), graph(bundle("llama", target))
    assert [value.name for value in model.graph.input][:3] == ["input_ids", "past_lengths", "new_lengths"]
    assert {fact.dtype for fact in manifest.inputs[:3]} == {"int32"}
    assert manifest.inputs[3].shape == ("batch", 2, CAPACITY, 16) == manifest.outputs[1].shape
    assert manifest.outputs[0].shape == ("batch", 1, 320)
    assert (manifest.cache, manifest.logits, manifest.capacity) == ("static", "last", CAPACITY)
    assert not model.functions


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "stablelm", "cohere", "smollm3"])
def test_plugin_nodes_have_the_plugins_attributes_and_no_holes(name: str) -> None:
    manifest, nodes = read_manifest(bundle(name, "trt-plugin")), plugin_nodes(graph(bundle(name, "trt-plugin")))
    assert len(nodes) == len(manifest.spec.layers)
    for layer, node in zip(manifest.spec.layers, nodes):
        found = attributes(node)
        assert found.pop("plugin_version") == fields.PLUGIN_VERSION.encode()
        assert found.pop("plugin_namespace") == fields.NAMESPACE.encode()
        assert set(found) == {field for field, _ in fields.CREATION}
        assert (node.domain, found["growing"], found["has_new"]) == (attention_op.DOMAIN, 0, 1)
        assert (found["num_heads"], found["kv_num_heads"], found["window"], found["softcap"]) == (
            layer.num_heads, layer.kv_num_heads, layer.window, pytest.approx(layer.softcap))
        assert found["has_sinks"] == layer.sinks
        assert len(node.input) == len(fields.node_inputs(found))
        assert all(node.input)
        assert tuple(node.output[1:]) == graph_io.present_names(layer.layer)
        assert dict(zip(fields.node_inputs(found), node.input))["past_key"] == graph_io.past_names(layer.layer)[0]


@pytest.mark.parametrize(("name", "interleaved", "inside"), [
    ("llama", 0, 3), ("stablelm", 0, 3), ("cohere", 1, 3), ("gemma2", 0, 4), ("smollm3", 0, 4)])
def test_rotary_goes_into_the_plugin(name: str, interleaved: int, inside: int) -> None:
    model = graph(bundle(name, "trt-plugin"))
    found = [attributes(node) for node in plugin_nodes(model)]
    assert sum(each["has_rotary"] for each in found) == inside
    assert {each["rotary_interleaved"] for each in found if each["has_rotary"]} == {interleaved}
    assert not {"Cos", "Sin"} & {node.op_type for node in model.graph.node}
    tables = {tuple(tensor.dims) for tensor in model.graph.initializer if tensor.name.startswith("rotary/")}
    size = {"stablelm": 8, "gemma2": 24}.get(name, 16)
    assert tables == {(CAPACITY, size // 2)}


def test_two_rotary_tables_where_a_model_has_two() -> None:
    model = graph(bundle("gemma3", "trt-plugin"))
    assert sum(tensor.name.startswith("rotary/cos") for tensor in model.graph.initializer) == 2
    assert len({node.input[7] for node in plugin_nodes(model)}) == 2


def test_native_attention_has_one_output_a_boolean_mask_per_window_and_no_lengths() -> None:
    model = graph(bundle("gemma3", "trt-native"))
    nodes = [node for node in model.graph.node if node.op_type == "Attention"]
    assert len(nodes) == 6
    assert {len(node.output) for node in nodes} == {1}
    assert {len(node.input) for node in nodes} == {4}  # query, key, value, mask: never nonpad_kv_seqlen
    assert len({node.input[3] for node in nodes}) == 2  # one for the window of 16, one for all
    scatters = [node for node in model.graph.node if node.op_type == "TensorScatter"]
    assert len(scatters) == 12
    assert len({node.input[2] for node in scatters}) == 1
    assert all(node.input[0].startswith("past_key_values.") for node in scatters)
    assert next(entry.version for entry in model.opset_import if entry.domain == "") == 24


def run_native(past: int, new: int, sequence: int) -> np.ndarray:
    import onnxruntime

    folder = bundle("llama", "trt-native")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    feed = {"input_ids": np.ones((2, sequence), np.int32), "past_lengths": np.array([past, 0], np.int32),
            "new_lengths": np.array([new, sequence], np.int32)}
    feed.update({value.name: np.zeros((2, 2, CAPACITY, 16), np.float32) for value in session.get_inputs()[3:]})
    return session.run(["logits"], feed)[0]


@pytest.mark.parametrize(("past", "new", "sequence"), [(CAPACITY, 1, 1), (CAPACITY - 3, 1, 4), (-1, 1, 1)])
def test_native_lengths_that_cannot_be_give_nan_for_that_sequence_alone(past: int, new: int, sequence: int) -> None:
    logits = run_native(past, new, sequence)
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1]).all()


def test_native_fills_its_cache_to_the_last_token() -> None:
    assert np.isfinite(run_native(CAPACITY - 4, 4, 4)).all()


def window_one_longer(model: onnx.ModelProto) -> None:
    next(each for each in plugin_nodes(model)[0].attribute if each.name == "window").i += 1


def other_pairs(model: onnx.ModelProto) -> None:
    next(each for each in plugin_nodes(model)[0].attribute if each.name == "rotary_interleaved").i ^= 1


def mask_one_longer(model: onnx.ModelProto) -> None:
    window = next(t for t in model.graph.initializer if t.name.startswith("lengths/mask_16/before"))
    window.CopyFrom(onnx.numpy_helper.from_array(np.array(17), window.name))


def writes_one_late(model: onnx.ModelProto) -> None:
    """Every token lands behind its place."""
    node = next(node for node in model.graph.node if node.name == "lengths/past")
    node.output[0] = "late/before"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "late/one"))
    place = list(model.graph.node).index(node)
    model.graph.node.insert(place + 1, helper.make_node("Add", ["late/before", "late/one"], ["lengths/past.0"]))


@pytest.mark.parametrize(("change", "target"), [(other_pairs, "trt-plugin"), (mask_one_longer, "trt-native"),
                                                (writes_one_late, "trt-native")])
def test_a_wrong_graph_is_caught(tmp_path, change, target) -> None:
    folder = changed(bundle("mistral", target), tmp_path / "b", change)
    assert not validate(folder, checkpoint("mistral"), steps=STEPS).passed


def test_a_graph_whose_window_contradicts_its_manifest_is_refused_by_layer(tmp_path) -> None:
    folder = changed(bundle("mistral", "trt-plugin"), tmp_path / "b", window_one_longer)
    with refused("E-BUNDLE-CLAIM") as refusal:
        validate(folder, checkpoint("mistral"), steps=STEPS)
    assert "layer 0: window is 17" in refusal.error.what


def test_a_wrong_window_is_caught_where_the_manifest_has_it_too(tmp_path) -> None:
    folder = changed(bundle("mistral", "trt-plugin"), tmp_path / "b", window_one_longer)
    manifest = read_manifest(folder)
    layers = (replace(manifest.spec.layers[0], window=17), *manifest.spec.layers[1:])
    spec = replace(manifest.spec, layers=layers)
    (folder / MANIFEST).write_text(replace(manifest, spec=spec).to_json())
    assert not validate(folder, checkpoint("mistral"), steps=STEPS).passed


@pytest.mark.parametrize(("name", "reason"), [("gemma2", "cannot be relied on to cap scores"),
                                              ("gpt_oss", "has no attention sinks")])
def test_native_refuses_what_it_lacks_before_tracing_and_names_the_plugin(tmp_path, monkeypatch, name: str,
                                                                          reason: str) -> None:
    monkeypatch.setattr("gqa_export.trace.capture.export.export_decoder", lambda *_: pytest.fail("traced"))
    with refused("E-TARGET-LAYER", UnsupportedModel) as refusal:
        export_onnx(checkpoint(name), tmp_path / "b", ExportOptions("trt-native"))
    assert reason in refusal.error.what
    assert refusal.error.fix == "use --target trt-plugin"
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("target", "sizes", "fix"), [
    ("trt-native", {"value_head_size": 8}, "use --target trt-plugin"),
    ("trt-plugin", {"head_size": 512, "value_head_size": 512}, "use --target trt-native"),
    ("trt-plugin", {"head_size": 512, "value_head_size": 512, "softcap": 4.0}, "use --target ort and ONNX Runtime: no "
     "target for TensorRT can hold this model")])
def test_head_sizes_that_a_target_lacks_are_refused_with_the_way_out(target: str, sizes: dict, fix: str) -> None:
    layer = replace(AttentionSpec(0, 4, 2, 16, 16, 0.25), **sizes)
    spec = type("Spec", (), {"layers": (layer,), "states": ()})
    context = type("Context", (), {"spec": spec, "target": TARGETS[target]})
    with refused("E-TARGET-LAYER", UnsupportedModel) as refusal:
        refuse_layers(None, context)
    assert refusal.error.fix == fix
    assert "layer 0" in refusal.error.where


@pytest.mark.parametrize("options", [{"cache": "growing"}, {"logits": "all"}])
def test_an_engine_has_a_static_cache_and_last_logits_only(tmp_path, options: dict) -> None:
    with refused("E-TARGET-OPTION") as refusal:
        export_onnx(checkpoint("llama"), tmp_path / "b", ExportOptions("trt-plugin", **options))
    assert refusal.error.where == f"--{next(iter(options))}"


def test_a_plugin_node_of_another_version_is_not_interpreted() -> None:
    model = graph(bundle("llama", "trt-plugin"))
    plugin_nodes(model)[0].input.pop()
    with refused("E-BUNDLE-PLUGIN-NODE", InvalidBundle):
        interpret.interpret(model)


def test_cuda_is_not_offered_for_the_graph_of_an_engine() -> None:
    with pytest.raises(NotCheckedHere):
        validate(bundle("llama", "trt-plugin"), checkpoint("llama"), provider="cuda")


def test_command_line_exports_and_validates_a_plugin_bundle(tmp_path, program) -> None:
    done = program("onnx", checkpoint("llama"), "-o", tmp_path / "b", "--target", "trt-plugin", "--capacity", CAPACITY)
    assert done.returncode == 0, done.stderr
    assert f"trt-plugin, float32, static cache, capacity {CAPACITY}" in done.stdout
    assert "plugin nodes interpreted" in done.stdout
