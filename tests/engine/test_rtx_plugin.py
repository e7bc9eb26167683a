"""Engines of every kind of small model, with the plugin; what TensorRT keeps and refuses."""

from __future__ import annotations

import dataclasses
import shutil

import onnx
import pytest
from refusal import refused

from gqa_export.bundle.manifest import read_manifest
from gqa_export.files.sha256 import file_sha256

from .built import build, check_plugin

pytestmark = pytest.mark.whole_model

PLUGIN = [("gemma2", "fp16"), ("gemma3", "fp16"), ("gpt_oss", "bf16"), ("mistral", "fp16"),
          ("llama_mha 3", "fp16"), ("llama_mha 9", "bf16"), ("llama_mqa", "fp16"), ("llama", "fp32")]
"""softcap, two rotary tables and norms of queries, sinks and experts, a window in every layer, no grouping with few and
many heads, one key/value head, fp32"""


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
def test_a_timing_cache_and_a_workspace_limit_for_one_capability(rtx, tiny_bundle, tmp_path) -> None:
    for output in ("first", "second"):
        built = build(tiny_bundle("llama_mqa"), tmp_path / output, capabilities=(89,),
                      timing_cache=tmp_path / "timings", workspace_mb=64)
        assert built.facts.compute_capabilities == (89,)
        assert built.facts.build["workspace_mb"] == 64
        assert (tmp_path / "timings").stat().st_size > 0


@pytest.mark.slow
def test_a_graph_that_tensorrt_refuses_is_an_error_with_its_words_and_leaves_nothing(rtx, tiny_bundle,
                                                                                     tmp_path) -> None:
    bundle = shutil.copytree(tiny_bundle("llama_mqa"), tmp_path / "bundle")
    model = onnx.load(str(bundle / "model.onnx"), load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "MatMul").op_type = "NoSuchOp"
    onnx.save(model, str(bundle / "model.onnx"))
    text = (bundle / "gqa_export.json").read_text()
    fact = read_manifest(bundle).files["model.onnx"]
    text = text.replace(fact.sha256, file_sha256(bundle / "model.onnx"))
    text = text.replace(f'"size": {fact.size}', f'"size": {(bundle / "model.onnx").stat().st_size}')
    (bundle / "gqa_export.json").write_text(text)
    with refused("E-ENGINE-BUILD") as refusal:
        build(bundle, tmp_path / "engine")
    assert "NoSuchOp" in refusal.error.what
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
