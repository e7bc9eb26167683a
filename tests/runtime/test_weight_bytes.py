"""How many bytes of weights a decode step reads, as `bench` prints it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gqa_models
import pytest
from small_text import SENTENCES, byte_tokenizer

from gqa_export.bundle.graph_file import read_graph
from gqa_export.bundle.graph_safety import check_graph_files
from gqa_export.cli.bench import table
from gqa_export.engine.weight_bytes import weight_bytes_read
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.runtime.benchmark import cache_bytes_read, measure


@pytest.mark.parametrize("target", ["ort", "onnx"])
def test_fewer_bits_are_fewer_bytes_read(tmp_path: Path, target: str) -> None:
    gqa_models.write_tiny("llama_tied", tmp_path / "checkpoint")
    read = {}
    for method in ("keep", "int8", "int4"):
        done = export_onnx(tmp_path / "checkpoint", tmp_path / method,
                           ExportOptions(target=target, capacity=64, quantize=method,
                                         head="" if method == "keep" else "same"))
        check_graph_files(tmp_path / method, done.manifest)
        read[method] = weight_bytes_read(read_graph(tmp_path / method))
    assert read["keep"] > 3 * read["int8"] > 3 * read["int4"] > 0
    if target == "ort":
        speed = measure(tmp_path / "int4", prompt_tokens=4, new_tokens=2, batch=1, repeat=1, provider="cpu")
        assert speed.weight_bytes_per_token == read["int4"]
        assert table(speed).row_count == 8


@pytest.mark.parametrize(("codes", "kind", "bits"), [("", "float32", 32), ("int8", "int8", 8), ("int4", "int4", 4)])
def test_a_cache_is_counted_as_it_is_held_and_as_far_as_it_is_seen(tmp_path: Path, codes: str, kind: str,
                                                                  bits: int) -> None:
    byte_tokenizer(gqa_models.write_tiny("llama_tied", tmp_path / "checkpoint"))
    (tmp_path / "text.txt").write_text("".join(SENTENCES) * 4)
    done = export_onnx(tmp_path / "checkpoint", tmp_path / "b",
                       ExportOptions(capacity=64, kv_cache=codes, calibrate=tmp_path / "text.txt" if codes else None))
    layers = done.manifest.spec.layers
    size = sum(2 * layer.kv_num_heads * layer.head_size for layer in layers) * bits // 8
    speed = measure(tmp_path / "b", prompt_tokens=4, new_tokens=3, batch=2, repeat=1, provider="cpu")
    assert (speed.cache_kind, speed.cache_bytes_per_token, speed.cache_bytes_per_step) == (kind, size, 2 * 6 * size)
    seen = replace(done.manifest, spec=replace(done.manifest.spec, layers=(replace(layers[0], window=3), *layers[1:])))
    assert cache_bytes_read(seen, 6) == size * 6 - size // len(layers) * 3


@pytest.mark.parametrize("target", ["ort", "onnx"])
def test_of_experts_those_that_a_token_chooses_are_read(tmp_path: Path, target: str) -> None:
    """Two of four, as codes and as floating-point numbers."""
    gqa_models.write_tiny("mixtral", tmp_path / "checkpoint", num_hidden_layers=1)
    for method in ("int4", "keep"):
        done = export_onnx(tmp_path / "checkpoint", tmp_path / method,
                           ExportOptions(target=target, capacity=64, quantize=method))
        graph, experts = read_graph(tmp_path / method), 4 * 3 * 64 * 128 * 4
        if method == "int4":
            experts = sum(each.bytes for each in done.manifest.quantization.weights if each.experts)
        one, two, all_of_them = (weight_bytes_read(graph, tokens) for tokens in (1, 2, 8))
        assert two - one == experts / 2
        assert all_of_them == two
        assert one > experts / 2
