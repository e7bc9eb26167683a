"""Does a dry run say what the export then does, and write nothing? Is a memory budget kept?"""

from __future__ import annotations

import re
import subprocess
import sys

import gqa_models
import pytest
from refusal import refused

from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.weights.memory_budget import Budget, parse_size, peak_bytes

pytestmark = pytest.mark.whole_model


@pytest.mark.parametrize("weights", ["copy", "link"])
def test_a_dry_run_writes_nothing_and_names_the_sizes_that_the_export_then_has(tmp_path, program, weights):
    folder = gqa_models.write_tiny("gemma2", tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    said = program("onnx", folder, "--dry-run", "--weights", weights, "--target", "onnx")
    assert said.returncode == 0, said.stderr
    assert sorted(tmp_path.rglob("*")) == before
    done = export_onnx(folder, tmp_path / "out", ExportOptions(weights=weights, target="onnx"))
    rows = re.findall(r"^    (\S+) +([\d.,]+) MB", said.stdout, re.M)
    sizes = {name: float(size.replace(",", "")) for name, size in rows}
    assert sizes["model.onnx"] == pytest.approx((tmp_path / "out" / "model.onnx").stat().st_size / 1e6, abs=0.06)
    assert ("model.onnx.data" in sizes) == (tmp_path / "out" / "model.onnx.data").exists()
    assert ("model.safetensors" in sizes) == (weights == "link")
    assert len(done.manifest.fallbacks) == said.stdout.count("  fallback: ") == 4


def test_a_dry_run_says_for_every_target_what_it_would_do(tmp_path, program):
    folder = gqa_models.write_tiny("gpt_oss", tmp_path / "model")
    said = program("onnx", folder, "--dry-run").stdout
    assert re.search(r"ort +holds all 4 layers as com.microsoft::GroupQueryAttention", said), said
    assert re.search(r"onnx +4 of 4 layers as gqa::GroupedQueryAttention: layers 0-3: Attention", said), said
    assert re.search(r"trt-native +refused: ", said), said


def test_an_export_without_a_place_to_write_to_is_a_usage_error(tmp_path, program):
    done = program("onnx", gqa_models.write_tiny("llama", tmp_path / "model"))
    assert done.returncode == 2
    assert "--output" in done.stderr


@pytest.mark.parametrize(("text", "size"), [("1GB", 10**9), ("1.5 GiB", 1610612736), ("800mb", 8 * 10**8), ("77", 77)])
def test_sizes_are_read_in_every_usual_spelling(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "1PB"])
def test_what_is_no_size_is_refused(text):
    with refused("E-OPTION-MEMORY"):
        parse_size(text)


def cold(*words):
    """In a process of its own, from its start: a budget counts all its memory."""
    return subprocess.run([sys.executable, "-m", "gqa_export", *map(str, words)], capture_output=True, text=True)


def test_a_budget_that_is_exceeded_ends_the_export_and_leaves_nothing(tmp_path):
    folder = gqa_models.write_tiny("llama", tmp_path / "model")
    done = cold("onnx", folder, "-o", tmp_path / "out", "--max-ram", "50MB")
    assert done.returncode == 2
    assert "--max-ram allows 0.05" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_what_has_to_be_loaded_is_refused_before_it_is_loaded():
    Budget(peak_bytes() + (1 << 30)).need(1 << 29, "loading")
    with refused("E-ENV-MEMORY") as refusal:
        Budget(peak_bytes() + (1 << 30)).need(1 << 31, "loading")
    assert "2.15 GB" in refusal.error.what
