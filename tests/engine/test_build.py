"""What is refused before anything is built, and what a build is checked for; TensorRT itself is in test_rtx_*.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from refusal import refused

from gqa_export.bundle.engine_facts import EngineFacts
from gqa_export.bundle.manifest import Manifest
from gqa_export.bundle.writer import writing_bundle
from gqa_export.engine import build
from gqa_export.engine.build import EngineOptions, build_engine
from gqa_export.engine.build_job import Built, Tensor
from gqa_export.engine.build_log import Layer, Log
from gqa_export.engine.choose_library import Choice
from gqa_export.engine.inspect_build import TYPES, check, expected_aliases
from gqa_export.engine.profiles import make_profiles
from gqa_export.environment.tensorrt_libraries import Library
from gqa_export.errors import GqaExportError, InvalidBundle, NotCheckedHere
from gqa_export.graph_io import graph_inputs, graph_outputs
from gqa_export.spec import AttentionSpec, ModelSpec

LAYERS = tuple(AttentionSpec(number, 4, 2, 32, 48, 0.125) for number in range(2))
SPEC = ModelSpec("llama", "LlamaForCausalLM", 100, 64, 512, "default", LAYERS)
MANIFEST = Manifest("trt-plugin", "float16", "static", 128, "last", "copy", SPEC,
                    graph_inputs(SPEC, "float16", "static", "lengths", 128),
                    graph_outputs(SPEC, "float16", "static", "last", 128), source={"checkpoint": "CK"})


@pytest.fixture
def bundle(tmp_path):
    """(changes to the manifest) -> a bundle folder, its graph none."""
    def make(graph: bytes = b"not a graph", **changes) -> Path:
        folder = tmp_path / "bundle"
        with writing_bundle(folder) as writer:
            writer.write("model.onnx", graph)
            writer.finish(replace(MANIFEST, **changes))
        return folder

    return make


@pytest.fixture(autouse=True)
def _machine(monkeypatch) -> None:
    """TensorRT for RTX is here, no GPU is."""
    choice = Choice(Library("rtx", "tensorrt_rtx", "1.7", ()), (80,), (80,))
    monkeypatch.setattr(build, "choose", lambda flavor, asked, plugin: choice)
    monkeypatch.setattr(build, "nvidia", lambda: ("", ()))


@pytest.mark.parametrize(("changes", "options", "code", "fix"), [
    ({"target": "ort"}, {}, "E-ENGINE-TARGET", "gqa-export onnx CK -o DIR --target trt-plugin"),
    ({"target": "portable"}, {"attention": "native"}, "E-ENGINE-TARGET", "--target trt-native"),
    ({"target": "unheard-of"}, {}, "E-ENGINE-TARGET", "--target trt-plugin"),
    ({}, {"attention": "native"}, "E-ENGINE-ATTENTION", "--target trt-native"),
    ({"target": "trt-native"}, {"attention": "plugin"}, "E-ENGINE-ATTENTION", "--target trt-plugin"),
    ({}, {"capacity": 256}, "E-ENGINE-CAPACITY", "--capacity 256"),
    ({}, {"dtype": "bf16"}, "E-ENGINE-DTYPE", "--dtype bf16"),
    ({}, {"max_prompt": 129}, "E-ENGINE-PROMPT", "--max-prompt 128"),
    ({"engine": EngineFacts("rtx", "1", (89,), "plugin", (), {})}, {}, "E-ENGINE-BUILT", "built from"),
])
def test_a_bundle_that_does_not_fit_the_options_is_refused(bundle, tmp_path, changes, options, code, fix) -> None:
    folder = bundle(**changes)
    with refused(code) as refusal:
        build_engine(folder, tmp_path / "engine", EngineOptions(**options))
    assert fix in refusal.error.fix
    assert refusal.error.exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


@pytest.mark.parametrize("options", [{"capacity": 128}, {"dtype": "fp16"}, {"attention": "plugin"}, {}])
def test_what_the_bundle_fixes_may_be_said_again(bundle, tmp_path, options) -> None:
    assert build.check_bundle(bundle(), MANIFEST, EngineOptions(**options)) == "plugin"


def test_a_damaged_bundle_is_refused_before_the_build(bundle, tmp_path) -> None:
    folder = bundle()
    (folder / "model.onnx").write_bytes(b"not a gr-ph")
    with refused("E-BUNDLE-HASH"):
        build_engine(folder, tmp_path / "engine")


def test_a_graph_that_rounds_otherwise_than_its_manifest_says_is_refused_before_the_build(bundle, tmp_path) -> None:
    """An engine has no graph that could be held against the manifest, and no number tells what rounding it leaves out
    or adds: `validate` of the engine would pass it."""
    nodes = [onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
             onnx.helper.make_node("DequantizeLinear", ["codes", "scale"], ["numbers"]),
             onnx.helper.make_node("MatMul", ["numbers", "head"], ["logits"])]
    constants = [onnx.numpy_helper.from_array(np.float32(0.5), "scale"),
                 onnx.TensorProto(name="zero", data_type=onnx.TensorProto.FLOAT8E4M3FN, raw_data=b"\0"),
                 onnx.numpy_helper.from_array(np.ones((4, 4), np.float32), "head")]
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in ("x", "logits")]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", values[:1], values[1:], constants))
    with refused("E-BUNDLE-CLAIM", InvalidBundle) as refusal:
        build_engine(bundle(model.SerializeToString()), tmp_path / "engine")
    assert "products with head round their inputs to e4m3 by 0.5 in the graph, not at all" in refusal.error.what
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_an_output_that_is_taken_is_refused_first(bundle, tmp_path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "thesis.tex").write_text("mine")
    for force in (False, True):
        with pytest.raises(GqaExportError):
            build_engine(bundle() if not (tmp_path / "bundle").exists() else tmp_path / "bundle", tmp_path / "engine",
                         EngineOptions(force=force))
    assert (tmp_path / "engine" / "thesis.tex").read_text() == "mine"


def test_stripped_weights_need_a_gpu(bundle, tmp_path) -> None:
    with refused("E-ENV-GPU", NotCheckedHere):
        build_engine(bundle(), tmp_path / "engine", EngineOptions(strip_weights=True))


def test_a_timing_cache_nowhere_and_a_prompt_beyond_the_cache_are_refused_before_an_export(tmp_path) -> None:
    with refused("E-FILE-FOLDER"):
        build.check_request(tmp_path / "e", EngineOptions(timing_cache=tmp_path / "no" / "file"), "plugin")
    with refused("E-ENGINE-PROMPT"):
        build.check_request(tmp_path / "e", EngineOptions(capacity=64, max_prompt=65), "plugin")


def test_profiles_are_decode_and_prefill_with_the_capacity_literal() -> None:
    decode, prefill = make_profiles(MANIFEST, max_batch=4, max_prompt=0)
    assert (decode.name, prefill.name) == ("decode", "prefill")
    assert decode.shapes["input_ids"] == ((1, 1), (1, 1), (4, 1))
    assert prefill.shapes["input_ids"] == ((1, 1), (1, 128), (4, 128))
    for profile in (decode, prefill):
        assert profile.shapes["past_key_values.1.value"] == ((1, 2, 128, 48), (1, 2, 128, 48), (4, 2, 128, 48))
        assert profile.shapes["past_lengths"] == ((1,), (1,), (4,))
        assert set(profile.shapes) == {tensor.name for tensor in MANIFEST.inputs}
    large = replace(MANIFEST, capacity=100_000)
    assert make_profiles(large, 1, 0)[1].shapes["input_ids"] == ((1, 1), (1, 512), (1, 4096))
    assert make_profiles(large, 1, 50_000)[1].most("input_ids", 1) == 50_000


def test_an_engine_of_a_longrope_model_takes_any_prompt_at_once() -> None:
    two_tables = replace(MANIFEST, capacity=100_000, spec=replace(SPEC, rope_switch=4096))
    assert make_profiles(two_tables, 1, 0)[1].most("input_ids", 1) == 100_000
    with refused("E-ENGINE-PROMPT-PIECES"):
        make_profiles(two_tables, 1, 50_000)


def test_a_capacity_that_is_not_literal_is_refused() -> None:
    inputs = (*MANIFEST.inputs[:-1], replace(MANIFEST.inputs[-1], shape=("batch", 2, "capacity", 48)))
    with refused("E-ENGINE-AXIS"):
        make_profiles(replace(MANIFEST, inputs=inputs), 1, 0)


NAMES = {dtype: name for name, dtype in TYPES.items()}


def good() -> tuple[Built, Log]:
    """The facts and the log of a sound build."""
    tensors = [tuple(Tensor(fact.name, NAMES[fact.dtype], tuple(-1 if isinstance(axis, str) else axis
                                                                for axis in fact.shape)) for fact in facts)
               for facts in (MANIFEST.inputs, MANIFEST.outputs)]
    layers = tuple(Layer(f"layer{number}", "PluginV3", profile, ("past_key_values.0.key",), ("present.0.key",))
                   for profile in (0, 1) for number in (0, 1))
    return Built("1.7", *tensors, expected_aliases(MANIFEST), 2, 0, 1, 1.0), Log(layers, {})


def test_a_sound_build_passes() -> None:
    check(MANIFEST, *good(), 2, plugin=True)


COPY = Layer("Reformatting CopyNode", "Reformat", 1, ("past_key_values.0.key",), ("x",))


@pytest.mark.parametrize(("built", "log", "code", "place"), [
    (lambda b: replace(b, inputs=b.inputs[:-1]), None, "E-ENGINE-TENSORS", "number of inputs"),
    (lambda b: replace(b, outputs=(replace(b.outputs[0], type="FLOAT"), *b.outputs[1:])), None,
     "E-ENGINE-TENSORS", "output logits"),
    (lambda b: replace(b, inputs=(*b.inputs[:-1], replace(b.inputs[-1], shape=(-1, 2, 64, 48)))), None,
     "E-ENGINE-TENSORS", "past_key_values.1.value"),
    (lambda b: replace(b, aliases={}), None, "E-ENGINE-BUILD-ALIAS", "present.0.key"),
    (lambda b: replace(b, aliases={**b.aliases, "present.0.key": "past_key_values.1.key"}), None,
     "E-ENGINE-BUILD-ALIAS", "present.0.key"),
    (lambda b: replace(b, plugin_layers=1), None, "E-ENGINE-PLUGIN-LAYERS", "1 plugin"),
    (lambda b: replace(b, containers=2), None, "E-ENGINE-BUILD-KERNELS", "2 times"),
    (lambda b: replace(b, containers=0), None, "E-ENGINE-BUILD-KERNELS", "0 times"),
    (None, lambda g: replace(g, layers=g.layers[:-1]), "E-ENGINE-PLUGIN-LAYERS", "profile 1"),
    (None, lambda g: replace(g, layers=(*g.layers, COPY)), "E-ENGINE-COPY", COPY.name),
])
def test_anything_that_differs_from_the_bundle_is_an_error(built, log, code, place) -> None:
    made, listed = good()
    with refused(code) as refusal:
        check(MANIFEST, built(made) if built else made, log(listed) if log else listed, 2, plugin=True)
    assert place in refusal.error.what


def test_a_log_that_lists_nothing_is_not_held_against_the_engine() -> None:
    check(MANIFEST, good()[0], Log((), {}), 2, plugin=True)
