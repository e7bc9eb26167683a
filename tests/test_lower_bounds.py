"""The committed result of scripts/lower_bounds.py is about the bounds that pyproject.toml has now, and it passed."""

from __future__ import annotations

import json

import lower_bounds


def test_result_is_of_the_bounds_that_the_project_declares() -> None:
    result = json.loads(lower_bounds.OUTPUT.read_text(encoding="utf-8"))
    assert result["bounds"] == lower_bounds.bounds(), "run scripts/lower_bounds.py"
    for name, bound in result["bounds"].items():
        installed = result["installed"][name]
        assert installed == bound or installed.removeprefix(bound).strip(".0") == "", f"{name} {installed}, not {bound}"
    assert result["selection"] == [" ".join(part) for part in lower_bounds.SELECTION]


def test_result_is_a_pass_of_a_selection_that_ran() -> None:
    result = json.loads(lower_bounds.OUTPUT.read_text(encoding="utf-8"))
    assert result["passed"]
    assert not result["failures"] + result["errors"]
    assert result["tests"] - result["skipped"] >= 30


def test_constraints_are_the_project_s_but_for_the_bounded_packages() -> None:
    lowest = {"transformers": "5.1", "onnxruntime": "1.2"}
    kept = (lower_bounds.ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    made = lower_bounds.constraints(lowest).splitlines()
    assert {"transformers==5.1", "onnxruntime==1.2"} == set(made) - set(kept)
    assert {line.partition("==")[0] for line in set(kept) - set(made)} == {*lowest, *lower_bounds.LOOSE}
