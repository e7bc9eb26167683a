"""The committed figures of decoding hybrids are of the shapes of now, and hold what they were made to show."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import gqa_models

import gqa_export

ROOT = Path(gqa_export.__file__).parent.parent
RESULT: dict[str, Any] = json.loads((ROOT / "docs" / "benchmarks" / "hybrid_decode.json").read_text())
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "benchmark_hybrid_decode.py"))
PEERED, STATES = (table["rows"] for table in RESULT["tables"])


def test_the_figures_are_of_the_shapes_and_lengths_that_the_script_takes() -> None:
    assert RESULT["shapes"] == {name: gqa_models.shape(name) for name in (SCRIPT["PEERED"], SCRIPT["OTHER"])}
    for rows in (PEERED, STATES):
        assert tuple(row["past"] for row in rows) == SCRIPT["LENGTHS"] == (128, 1024, 8192)
    assert (ROOT / "docs" / "benchmarks" / "hybrid_decode.md").read_text() == SCRIPT["markdown"](RESULT)


def test_both_decoders_write_the_same_tokens_and_ours_is_as_fast() -> None:
    for row in PEERED:
        assert row["same_tokens"]
        assert row["ratio_pairs"] >= 0.95


def test_layers_with_states_cost_the_same_at_any_length() -> None:
    """The decoder beside them, whose attention grows with the length, becomes slower than they do."""
    first, *_, last = STATES
    assert last["24 and none"]["median_ms"] <= 1.25 * first["24 and none"]["median_ms"]
    shares = [row["24 and none"]["median_ms"] / row["18 and 6"]["median_ms"] for row in STATES]
    assert shares == sorted(shares, reverse=True)
