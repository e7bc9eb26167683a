"""The committed measurement of sessions is of this version of its script, and shows what the pages claim."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import gqa_export

ROOT = Path(gqa_export.__file__).parent.parent
DATA = json.loads((ROOT / "docs" / "benchmarks" / "sessions.json").read_text())
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "benchmark_sessions.py"))


def test_the_measurement_and_its_page_are_of_this_script() -> None:
    assert DATA["settings"] == SCRIPT["settings"]()
    assert (ROOT / "docs" / "benchmarks" / "sessions.md").read_text() == SCRIPT["page"](DATA)


def test_the_width_that_guesses_were_checked_at_is_the_one_that_the_suite_proves() -> None:
    from gqa_export.compare.suite import VERIFY_WIDTH

    assert DATA["verify_width"] == VERIFY_WIDTH


def test_four_ragged_chunks_in_one_call_take_at_most_half_the_time_of_four_calls() -> None:
    """With few tokens a row, where reading the weights once instead of four times counts; with more, padding is
    computed, and beyond that the session runs the rows one by one as it does without (5 % for measuring)."""
    for kinds in DATA["chunks"].values():
        few, more, pieces = kinds["few tokens"], kinds["more tokens"], kinds["pieces of prompts"]
        assert (few["with_calls"], few["without_calls"]) == (1, 4)
        assert few["ratio"] <= 0.5
        assert more["with_calls"] == 1
        assert more["ratio"] < 0.8
        assert pieces["with_calls"] == 4
        assert pieces["ratio"] < 1.05
        # other sums in another order: fp32's rounding of logits up to about 30
        assert all(found["largest_difference"] < 1e-3 for found in kinds.values())


def test_guesses_give_the_same_tokens_sooner_where_the_answer_repeats_its_prompt() -> None:
    assert all(found["same_tokens"] for found in DATA["speculation"].values())
    assert DATA["speculation"]["summarise"]["ratio"] >= 1.3
