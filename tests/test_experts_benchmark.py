"""The committed measurement of experts is of this version of its script, and shows what docs/quantization.md says."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import gqa_export

ROOT = Path(gqa_export.__file__).parent.parent
DATA = json.loads((ROOT / "docs" / "benchmarks" / "experts.json").read_text())
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "benchmark_experts.py"))


def test_the_measurement_is_of_this_script() -> None:
    rows = [(tuple(row["shape"]), row["bits"], row["tokens"]) for row in DATA["rows"]]
    assert rows == [(shape, bits, tokens) for shape in SCRIPT["SHAPES"] for bits in SCRIPT["BITS"]
                    for tokens in SCRIPT["TOKENS"]]
    assert all(set(row["cpu_ms"]) == set(SCRIPT["WAYS"]) for row in DATA["rows"])


def test_rows_split_by_expert_are_faster_than_matrices_picked_by_index() -> None:
    for row in DATA["rows"]:
        times, errors = row["cpu_ms"], row["error"]
        assert times["split"] < times["picked fp32"] / 3
        assert errors["split, exact"] < 2e-6  # of fp32 sums over 1,024 columns
        assert errors["split"] < 0.03  # inputs of 8 bits, twice one after the other
        assert row["bits"] == 8 or times["split, exact"] < times["picked fp32"]


def test_the_page_shows_it() -> None:
    page = (ROOT / "docs" / "quantization.md").read_text()
    for row in DATA["rows"]:
        times = " | ".join(f"{row['cpu_ms'][way]:g}" for way in SCRIPT["WAYS"])
        assert f"| {row['bits']} | {row['tokens']} | {times} |" in page
