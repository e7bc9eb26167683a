"""How many bytes of weights a decode step reads, as `bench` prints it."""

from __future__ import annotations

from pathlib import Path

import gqa_models
import pytest

from gqa_export.bundle.graph_file import read_graph
from gqa_export.bundle.graph_safety import check_graph_files
from gqa_export.cli.bench import table
from gqa_export.engine.weight_bytes import weight_bytes_read
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.runtime.benchmark import measure


@pytest.mark.parametrize("target", ["ort", "onnx"])
def test_fewer_bits_are_fewer_bytes_read(tmp_path: Path, target: str) -> None:
    gqa_models.write_tiny("llama_tied", tmp_path / "checkpoint")
    read = {}
    for method in ("keep", "int8", "int4"):
        done = export_onnx(tmp_path / "checkpoint", tmp_path / method,
                           ExportOptions(target=target, capacity=64, quantize=method, head="same"))
        check_graph_files(tmp_path / method, done.manifest)
        read[method] = weight_bytes_read(read_graph(tmp_path / method))
    assert read["keep"] > 3 * read["int8"] > 3 * read["int4"] > 0
    if target == "ort":
        speed = measure(tmp_path / "int4", prompt_tokens=4, new_tokens=2, batch=1, repeat=1, provider="cpu")
        assert speed.weight_bytes_per_token == read["int4"]
        assert table(speed).row_count == 7


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
