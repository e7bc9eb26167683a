"""The C++ programs for `ort` bundles: compiled and run where the headers of ONNX Runtime and its genai are at hand.

No wheel brings those headers. ORT_INCLUDE and GENAI_INCLUDE name the folders of onnxruntime_cxx_api.h and ort_genai.h;
without them the committed result of `scripts/ort_cpp_example.py` is all, and it must be of these very programs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import ort_cpp_example as script
import pytest

from .conftest import require_tools


def test_the_committed_result_is_of_these_programs_and_every_token_was_equal() -> None:
    report = json.loads(script.RESULT.read_text(encoding="utf-8"))
    assert report["sources_sha256"] == script.sources_sha256(), "run scripts/ort_cpp_example.py again"
    plain = [row for row in report["rows"] if "cache" not in row]
    assert [row["model"] for row in plain] == list(script.MODELS)
    assert all(row[program] for row in plain for program in script.PROGRAMS)
    assert [(row["cache"], row["ort_generate"]) for row in report["rows"] if "cache" in row] == [
        (cache, True) for cache in script.CACHES]


def test_both_programs_give_ragged_prompts_the_tokens_that_python_gives_each_alone(tmp_path: Path) -> None:
    includes = [os.environ.get(name, "") for name in ("ORT_INCLUDE", "GENAI_INCLUDE")]
    if not all(includes):
        pytest.skip("no headers: set ORT_INCLUDE and GENAI_INCLUDE to the folders of onnxruntime_cxx_api.h and "
                    "ort_genai.h; the committed result is checked instead")
    require_tools()
    environment = script.build(tmp_path / "build", *map(Path, includes))
    bundle = script.tiny_bundle("llama", tmp_path)
    assert script.compare(tmp_path / "build", environment, bundle) == dict.fromkeys(script.PROGRAMS, True)
