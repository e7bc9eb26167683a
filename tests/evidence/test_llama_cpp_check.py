"""The committed comparison with llama.cpp is about the reader as it is now, and it passed."""

from __future__ import annotations

import json

import llama_cpp_check
from gguf_models import CASES

RESULT = json.loads(llama_cpp_check.RESULT.read_text(encoding="utf-8"))


def test_the_result_is_about_these_sources():
    assert RESULT["sources"] == llama_cpp_check.sources_hash(), "run scripts/llama_cpp_check.py"


def test_every_case_was_compared_and_passed():
    rows = {row["case"]: row for row in RESULT["rows"]}
    assert set(CASES) <= set(rows)
    assert {name for name, row in rows.items() if "left_out" in row} == set(llama_cpp_check.LEFT_OUT)
    for name, row in rows.items():
        if "left_out" not in row:
            assert row["passed"], name
            assert row["difference"] < row["allowed"]
            assert row["allowed"] < 0.1
    assert RESULT["allowed"] == llama_cpp_check.ALLOWED


def test_the_page_is_that_of_the_result():
    assert llama_cpp_check.RESULT.with_suffix(".md").read_text(encoding="utf-8") == llama_cpp_check.page(RESULT)
