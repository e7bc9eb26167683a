"""A model of any size costs the same: sparse checkpoints of published shapes are exported, committed figures are held
to what they were made to show and to the graphs that this code makes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx

ROOT = Path(__file__).parent.parent


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows():
    return json.loads((ROOT / "docs" / "benchmarks" / "scale.json").read_text())["rows"]


def hybrid(rows):
    return [row for row in rows if row["what"].startswith("Qwen3-Next")]


def dense(rows):
    return [row for row in rows if row not in hybrid(rows)]


@pytest.mark.whole_model
def test_a_model_of_800_gigabytes_is_exported_without_touching_a_weight(tmp_path, rows):
    total = script("sparse_checkpoint").write_sparse("llama-3.1-405b", tmp_path / "405b")
    assert total == 811_706_777_600
    assert sum(path.stat().st_blocks * 512 for path in (tmp_path / "405b").iterdir()) < 10_000_000
    done = export_onnx(tmp_path / "405b", tmp_path / "out", ExportOptions(weights="link"))
    assert done.manifest.bytes_copied == 0
    assert done.manifest.bytes_linked == total
    assert (done.traced_layers, len(done.manifest.spec.layers)) == (2, 126)
    assert done.nodes == dense(rows)[-1]["nodes"], "run scripts/benchmark_scale.py again and commit its result"


@pytest.mark.whole_model
def test_a_hybrid_of_48_layers_is_exported_without_touching_a_weight(tmp_path, rows):
    total = script("sparse_checkpoint").write_sparse("qwen3-next-48l", tmp_path / "hybrid")
    done = export_onnx(tmp_path / "hybrid", tmp_path / "out", ExportOptions(weights="link"))
    assert (done.manifest.bytes_copied, done.manifest.bytes_linked) == (0, total)
    assert done.traced_layers == 4
    assert done.nodes == hybrid(rows)[-1]["nodes"], "run scripts/benchmark_scale.py again and commit its result"


def test_sparse_and_filled_checkpoints_are_what_their_configuration_says(tmp_path):
    write = script("sparse_checkpoint").write_sparse
    total = write("smollm2", tmp_path / "sparse", layers=1, dtype="float16")
    filled = write("smollm2", tmp_path / "filled", layers=1, dtype="float16", fill=True)
    assert total == filled
    for name, zero in (("sparse", True), ("filled", False)):
        model = load_model(open_checkpoint(tmp_path / name))
        assert model.config.num_hidden_layers == 1
        assert (model.model.norm.weight.abs().max() == 0).item() is zero


def test_the_committed_figures_hold_what_they_were_made_to_show(rows):
    small, converted, *deep = dense(rows)
    assert small["peak_gb"] <= 1.0
    assert small["written_gb"] == 0.0
    assert converted["peak_gb"] <= 1.0
    assert converted["written_gb"] > 2.4
    assert [row["layers"] for row in deep] == [2, 8, 32, 64, 126]
    assert max(row["wall_s"] for row in deep) <= 12
    assert max(row["peak_gb"] for row in deep) <= 1.3


def test_a_hybrid_costs_the_same_at_any_depth(rows):
    first, *_, last = grown = hybrid(rows)
    assert [row["layers"] for row in grown] == [8, 16, 32, 48]
    assert last["wall_s"] <= 30
    assert last["peak_gb"] <= 1.5
    assert last["peak_gb"] <= 1.25 * first["peak_gb"]
    assert last["cpu_s"] <= 1.5 * first["cpu_s"]
    assert not any(row["written_gb"] for row in grown)
