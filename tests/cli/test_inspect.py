"""`gqa-export inspect`: the layers as the model really calls attention, and cache bytes that can be counted by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import gqa_models
import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from gqa_export import graph_io
from gqa_export.bundle.engine_facts import EngineFacts, ProfileFacts
from gqa_export.bundle.manifest import MODEL, Manifest
from gqa_export.bundle.parallel import HeldHeads, ParallelFacts, RankFacts
from gqa_export.bundle.quantization import PLAIN, Quantization, QuantizedWeight
from gqa_export.bundle.writer import writing_bundle
from gqa_export.cli import main
from gqa_export.cli.inspect import numbers
from gqa_export.cli.tables import aligned, readable_bytes
from gqa_export.describe.inspection import cache_costs, kind_of_attention, layer_groups
from gqa_export.spec import AttentionSpec, Fallback, ModelSpec

LAYER = AttentionSpec(0, 8, 2, 16, 12, 0.25)
SPEC = ModelSpec("llama", "LlamaForCausalLM", 100, 64, 8192, "default",
                 (LAYER, replace(LAYER, layer=1, window=16), replace(LAYER, layer=2)))


def inspect(*arguments: object):
    result = CliRunner().invoke(main, ["inspect", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def bundle(tmp_path):
    """A bundle with two stored tensors, one of them used twice."""
    manifest = Manifest("ort", "fp16", "static", 2048, "all", "copy", SPEC,
                        graph_io.graph_inputs(SPEC, "float16", "static"),
                        graph_io.graph_outputs(SPEC, "float16", "static", "all"),
                        (Fallback(1, "GroupQueryAttention", "function", "value heads have another size"),),
                        versions={"torch": "2.13.0"})

    def tensor(name: str, offset: int):
        made = onnx.TensorProto(name=name, dims=[3, 4], data_type=onnx.TensorProto.FLOAT16,
                                data_location=onnx.TensorProto.EXTERNAL)
        for key, value in {"location": "model.onnx.data", "offset": str(offset), "length": "24"}.items():
            made.external_data.add(key=key, value=value)
        return made

    inline = onnx.numpy_helper.from_array(np.zeros(5, np.float32), "inline")
    graph = onnx.helper.make_graph([], "g", [], [], [tensor("a", 0), tensor("tied to a", 0), tensor("b", 24), inline])
    with writing_bundle(tmp_path / "bundle") as writer:
        writer.write(MODEL, onnx.helper.make_model(graph).SerializeToString())
        writer.finish(manifest)
    return tmp_path / "bundle"


def test_cache_bytes_are_heads_times_sizes_times_tokens() -> None:
    one, *_, longest = cache_costs(SPEC, "fp16", 8192)
    assert one.bytes == 3 * 2 * (16 + 12) * 2
    assert one.mha_bytes == one.bytes * 4
    assert one.mqa_bytes == one.bytes // 2
    assert (longest.tokens, longest.bytes) == (8192, 8192 * one.bytes)


def test_contexts_stop_at_what_the_model_can_hold() -> None:
    assert [cost.tokens for cost in cache_costs(SPEC, "fp32", 8192)] == [1, 1024, 4096, 8192]
    assert [cost.tokens for cost in cache_costs(SPEC, "fp32", 4096)] == [1, 1024, 4096]
    assert [cost.tokens for cost in cache_costs(SPEC, "fp32", 512)] == [1, 512]


@pytest.mark.parametrize(("kv_heads", "kind"), [(8, "MHA"), (4, "GQA"), (2, "GQA"), (1, "MQA")])
def test_kind_of_attention(kv_heads: int, kind: str) -> None:
    assert kind_of_attention(replace(LAYER, kv_num_heads=kv_heads)) == kind


def test_equal_layers_share_a_row() -> None:
    assert [group.layers for group in layer_groups(SPEC.layers)] == [(0, 2), (1,)]


@pytest.mark.parametrize(("layers", "text"), [
    ((0,), "0"), ((0, 1, 2), "0-2"), ((0, 2, 4), "0-4 by 2"), ((5, 11, 17), "5-17 by 6"), ((0, 1, 3), "0-1, 3"),
    ((0, 2), "0, 2")])
def test_layer_numbers_are_written_short(layers, text) -> None:
    assert numbers(layers) == text


@pytest.mark.parametrize(("count", "text"), [(768, "768 B"), (46080, "45.0 KiB"), (47185920, "45.0 MiB"),
                                             (3 << 30, "3.0 GiB"), (2 << 50, "2048.0 TiB")])
def test_byte_counts_can_be_read(count, text) -> None:
    assert readable_bytes(count) == text


def test_columns_are_aligned() -> None:
    assert aligned(("name", "n"), [("a", "1"), ("long", "22")]) == ["  name   n", "  a      1", "  long  22"]


def test_bundle_shows_layers_cache_target_ports_and_fallbacks(bundle) -> None:
    text = inspect(bundle)
    assert "target ort, dtype float16, cache static, capacity 2048" in text
    assert "fallback: layer 1: function instead of GroupQueryAttention: value heads have another size" in text
    assert "past_key_values.0.key" in text
    assert "made with torch 2.13.0" in text
    assert any(line.split() == ["0,", "2", "GQA", "8", "2", "16/12", "all", "none", "no", "0.25"]
               for line in text.splitlines())


def test_bundle_counts_shared_tensors_once(bundle) -> None:
    data = json.loads(inspect(bundle, "--json"))
    assert data["parameters"] == 12 + 12 + 5
    assert data["weight_bytes"] == 24 + 24 + 20


def test_json_of_a_bundle_has_every_layer_and_the_manifest(bundle) -> None:
    data = json.loads(inspect(bundle, "--json"))
    assert [(layer["layer"], layer["kind"], layer["window"]) for layer in data["layers"]] == [
        (0, "GQA", 0), (1, "GQA", 16), (2, "GQA", 0)]
    assert data["bundle"]["target"] == "ort"
    assert data["kv_cache"][-1]["tokens"] == 2048


def test_bundle_without_a_readable_graph_is_refused(bundle) -> None:
    (bundle / MODEL).write_bytes(b"no protobuf\xff")
    result = CliRunner().invoke(main, ["inspect", str(bundle)])
    assert result.exit_code == 2
    assert "model.onnx is not an ONNX model" in result.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_engine_shows_its_matrices_cache_gpus_and_shapes(tmp_path, ranks) -> None:
    """Only a GPU opens an engine: the manifest says what there is to say."""
    weights = (QuantizedWeight("model.layers.0.mlp.up_proj.weight", "GGUF Q4_1", 4, 32, True, "DequantizeLinear", 640),
               QuantizedWeight("lm_head.weight", "float32", 16, 0, False, PLAIN, 1280, "it is the head"))
    profiles = tuple(ProfileFacts(name, {"input_ids": ((1, 1), (1, tokens), (2, tokens))})
                     for name, tokens in (("decode", 1), ("prefill", 32)))
    parallel = ParallelFacts(tuple(RankFacts(f"rank{rank}", tuple(
        HeldHeads(layer.layer, 4 * rank, 4, (rank,)) for layer in SPEC.layers), "0" * 64) for rank in range(2)),
        (), "whole", {}) if ranks > 1 else None
    manifest = Manifest("trt-plugin", "fp16", "static", 2048, "last", "copy", SPEC, (), (),
                        engine=EngineFacts("rtx", "1.7.0.1", (80, 120), "plugin", profiles, {}), parallel=parallel,
                        quantization=Quantization("keep", "exact", weights))
    names = [f"rank{rank}/model.engine" for rank in range(ranks)] if ranks > 1 else ["model.engine"]
    with writing_bundle(tmp_path / "engine") as writer:
        for name in names:
            writer.write(name, bytes(3 << 20))
        writer.finish(manifest)
    text = inspect(tmp_path / "engine")
    assert f"  {3 * ranks}.0 MiB of TensorRT engine" in text
    assert "engine model.engine: TensorRT for RTX 1.7.0.1, compute capability 8.0, 12.0, plugin attention" in text
    assert "profile prefill: sequences x new tokens from 1 x 1 to 2 x 32, chosen for 1 x 32" in text
    assert text.index("in the graph that the engine was built from:") < text.index("quantized weights: kept as stored")
    assert ("  model.layers.0.mlp.up_proj.weight: GGUF Q4_1 -> 4 bits, DequantizeLinear, block 32, lossless, 640 bytes"
            in text)
    assert "  lm_head.weight: float32 -> 16 bits, plain, rounded, 1,280 bytes: it is the head" in text
    assert "672.0 KiB" in text, "3 layers of 2 heads of 16 + 12 fp16 numbers, 2048 times"
    data = json.loads(inspect(tmp_path / "engine", "--json"))
    assert (data["parameters"], data["weight_bytes"], data["engine_bytes"]) == (None, None, 3 * ranks << 20)
    assert data["bundle"]["quantization"]["weights"][0]["stored"] == "GGUF Q4_1"
    (tmp_path / "engine" / names[-1]).unlink()
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "engine")])
    assert result.exit_code == 2
    assert f"the bundle's file {names[-1]} is missing" in result.stderr


def test_checkpoint_shows_windows_and_softcap_that_its_layers_pass(tmp_path) -> None:
    checkpoint = gqa_models.write_tiny("gemma2", tmp_path / "gemma2")
    data = json.loads(inspect(checkpoint, "--json"))
    config = json.loads((checkpoint / "config.json").read_text())
    windows = [config["sliding_window"] if kind == "sliding_attention" else 0 for kind in config["layer_types"]]
    assert [layer["window"] for layer in data["layers"]] == windows
    assert {layer["softcap"] for layer in data["layers"]} == {config["attn_logit_softcapping"]}
    assert data["kind"] == "checkpoint"


def test_checkpoint_counts_its_stored_parameters(tmp_path) -> None:
    from safetensors.numpy import load_file

    checkpoint = gqa_models.write_tiny("llama", tmp_path / "llama")
    stored = load_file(checkpoint / "model.safetensors")
    data = json.loads(inspect(checkpoint, "--json"))
    assert data["parameters"] == sum(tensor.size for tensor in stored.values())
    assert data["weight_bytes"] == sum(tensor.nbytes for tensor in stored.values())


def test_neither_bundle_nor_checkpoint_is_refused(tmp_path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert result.exit_code == 2
    assert "config.json" in result.stderr
    assert "fix:" in result.stderr
