"""Committed results must be of the graphs that this code makes, and hold what they were made to show."""

from __future__ import annotations

import importlib.util
import itertools
import json
import statistics
import sys
from pathlib import Path

import pytest
from evidence.whole_process import unbelievable
from gqa_plugins.grouped_attention.plan import CAPABILITIES

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "docs" / "benchmarks" / "smollm2.json"


def load(name):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report():
    """The committed report on the real model."""
    return json.loads(REPORT.read_text())


@pytest.fixture(scope="module")
def structures():
    """The graphs that this code makes of that model's shape."""
    return load("smollm2_report").structures()


def test_the_report_on_the_real_model_is_of_the_graphs_that_this_code_makes(report, structures):
    assert report["structures"] == structures, "run scripts/smollm2_report.py again and commit its result"


def test_the_graph_is_as_lean_as_the_best_peers(structures):
    for cache in ("growing", "static"):
        assert structures[f"ort {cache}"]["nodes"] <= 345
        assert structures[f"ort {cache} zero-copy"]["nodes"] <= 400
        assert structures[f"ort {cache}"]["functions"] == structures[f"onnx {cache}"]["functions"] == 0


def test_every_target_and_cache_of_the_real_model_passed_and_spoke_the_same_tokens(report):
    rows = report["bundles"]
    assert {(row["target"], row["cache"]) for row in rows} == {
        (target, cache) for target in ("ort", "onnx", "portable") for cache in ("growing", "static")}
    for row in rows:
        assert row["passed"]
        assert row["max_logit_difference"] <= 1e-3
        assert row["same_tokens"] == 128
    assert next(row for row in rows if "same_tokens_through_genai" in row)["same_tokens_through_genai"] == 128


def test_validation_of_the_real_model_took_no_longer_than_promised():
    report = json.loads((ROOT / "docs" / "benchmarks" / "validate.json").read_text())
    script = load("benchmark_validate")
    assert script.unbelievable(report) == []
    assert {row["level"]: row["limit_s"] for row in report["rows"]} == script.LIMITS
    assert (ROOT / "docs" / "benchmarks" / "validate.md").read_text() == script.page(report)
    for row in report["rows"]:
        assert row["passed"]
        assert row["steps"] >= 32
        assert row["wall_s"] <= row["limit_s"]
        assert row["peak_mb"] <= row["limit_mb"]


def test_a_cost_of_validation_without_its_circumstances_is_refused():
    script = load("benchmark_validate")
    row = dict.fromkeys(script.FIGURES, 1)
    report = dict.fromkeys(script.REQUIRED, 1) | {
        "rows": [row | {"level": level} for level in script.LIMITS], "load_before": 0.3, "cores": 2}
    assert script.unbelievable(report) == []
    for field in script.REQUIRED:
        assert script.unbelievable({name: value for name, value in report.items() if name != field}) == [
            f"lacks {field}"]
    for figure in script.FIGURES[1:]:
        assert script.unbelievable(report | {"rows": [
            {name: value for name, value in line.items() if name != figure} for line in report["rows"]]}) == [
                f"{level}: lacks {figure}" for level in script.LIMITS]
    assert script.unbelievable(report | {"rows": report["rows"][:1]}) == ["not all levels were run"]
    assert script.unbelievable(report | {"load_before": 1.4}) == ["the machine was busy before"]


def test_decoding_of_the_real_model_is_as_fast_as_promised():
    report = json.loads((ROOT / "docs" / "benchmarks" / "decode.json").read_text())
    script = load("benchmark_decode")
    assert script.unbelievable(report) == []
    assert (ROOT / "docs" / "benchmarks" / "decode.md").read_text() == script.page(report)
    assert all(row["speed"] >= 1.03 for row in report["rows"])
    shown = ", ".join(f"{row['speed']:.2f}" for row in report["rows"])
    assert f"after 128 and 1,024 tokens | **{shown}** |" in (ROOT / "README.md").read_text()


def test_a_speed_of_decoding_without_its_circumstances_is_refused():
    script = load("benchmark_decode")
    line = dict.fromkeys(script.FIGURES, 1)
    report = dict.fromkeys(script.REQUIRED, 1) | {
        "rows": [line | {"past": past} for past in script.LENGTHS], "load_before": 0.3, "cores": 2}
    assert script.unbelievable(report) == []
    for field in script.REQUIRED:
        assert script.unbelievable({name: value for name, value in report.items() if name != field}) == [
            f"lacks {field}"]
    assert script.unbelievable(report | {"rows": report["rows"][:1]}) == ["not all pasts were run"]
    assert script.unbelievable(report | {"load_before": 1.4}) == ["the machine was busy before"]
    shorter = [{name: value for name, value in one.items() if name != "same_tokens"} for one in report["rows"]]
    assert script.unbelievable(report | {"rows": shorter}) == [f"{past}: lacks same_tokens" for past in script.LENGTHS]


def test_the_comparison_of_exports_was_fair_and_is_what_the_readme_shows():
    result = json.loads((ROOT / "docs" / "benchmarks" / "export.json").read_text())
    assert unbelievable(result) == []
    assert {"copy", "link", "link, trace kept", "onnxruntime-genai builder", "mobius"} == set(result["costs"])
    readme = (ROOT / "README.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in readme.splitlines() if line.startswith("| ")}

    def shown(program, figure):
        return statistics.median(row[figure] for row in result["costs"][program])

    peers = ("onnxruntime-genai builder", "mobius")
    for label, ours in (("first export of a configuration, wall time", ("copy", "link")),
                        ("every later one (from the trace cache)", ("link, trace kept",))):
        for program in (*ours, *peers):
            assert f"{shown(program, 'wall_s'):.1f} s" in rows[label], f"{program} in the row {label!r}"
    for program in ("link", *peers):
        assert f"{shown(program, 'peak_mb') / 1000:.2f} GB" in rows["peak memory"]
    first, later = result["ratios"]["copy"], result["ratios"]["link, trace kept"]
    assert max(first["wall_s"], first["cpu_s"]) <= 0.85
    assert max(later["wall_s"], later["cpu_s"]) <= 0.35
    assert max(shown(program, "peak_mb") for program in ("copy", "link")) <= 550


def test_the_predicted_shares_of_decode_are_what_the_script_predicts():
    """Of the plan as it is now: a long sequence among short ones keeps every program busy, equal ones lose nothing."""
    report = json.loads((ROOT / "docs" / "benchmarks" / "decode_shares.json").read_text())
    script = load("decode_shares")
    rows = json.loads(json.dumps(script.predict()))
    assert rows == report["rows"], "run scripts/decode_shares.py, commit its result"
    assert (ROOT / "docs" / "benchmarks" / "decode_shares.md").read_text() == script.page(rows)
    found = {row["batch"]: row for row in rows}
    assert found[script.RAGGED]["before"] < 0.35
    assert found[script.RAGGED]["now"] >= 0.9
    assert min(found[name]["of_before"] for name in script.UNIFORM) >= 0.99
    for lengths in script.BATCHES.values():
        tiles = [count for count, _ in script.by_batch(lengths, 264, 256)]
        assert sum(tiles) == sum(script.tiles_of(lengths)) * script.KV_HEADS
        assert max(tiles) <= max(4, -(-sum(tiles) // 264))


def test_the_kernels_for_long_prompts_were_compiled_for_every_capability_from_these_sources():
    report = json.loads((ROOT / "docs" / "benchmarks" / "long_kernels_compiled.json").read_text())
    script = load("compile_kernels")
    assert report["sources_sha256"] == script.sources_sha256(long=True), (
        "run scripts/compile_kernels.py --long, commit its result")
    done = {(row["model"], row["dtype"], row["capability"]) for row in report["rows"]}
    assert done == {(f"{model}, {method}", dtype, capability) for model, dtype in script.LONG_MODELS
                    for method in ("tiles", "hyper") for capability in CAPABILITIES}
    for row in report["rows"]:
        assert row["kernels"] == 3
        assert 0 < row["most_shared_bytes"] <= row["shared_limit_bytes"]


def test_every_kernel_of_four_models_was_compiled_for_every_capability_from_these_sources():
    report = json.loads((ROOT / "docs" / "benchmarks" / "kernels_compiled.json").read_text())
    script = load("compile_kernels")
    assert report["sources_sha256"] == script.sources_sha256(), "run scripts/compile_kernels.py, commit its result"
    done = {(row["model"], row["dtype"], row["capability"]) for row in report["rows"]}
    coded = {(f"{script.CODED_MODEL}, {cache} cache", script.CODED_DTYPE, capability) for cache in ("int8", "fp8")
             for capability in CAPABILITIES if cache == "int8" or capability >= 89}
    assert done == set(itertools.product(script.MODELS, script.DTYPES, CAPABILITIES)) | coded
    for row in report["rows"]:
        # layers of Gemma have two kinds of window
        assert row["kernels"] == (6 if row["model"].startswith("Gemma") else 4)
        assert row["code_bytes"] > 0
        assert row["most_shared_bytes"] <= row["shared_limit_bytes"]
