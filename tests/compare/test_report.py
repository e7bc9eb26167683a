"""What a verdict looks like on paper: stable JSON, JUnit, a table."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from gqa_export.compare.report import details, print_verdict, write_json, write_junit
from gqa_export.compare.verdict import SCHEMA_VERSION

from .conftest import Scripted, scripted_verdict


def wrong(t, logits):
    if t == 60:
        logits[7] = np.nan


@pytest.fixture(scope="module")
def good():
    return scripted_verdict(Scripted(noise=1e-6))[0]


@pytest.fixture(scope="module")
def bad():
    return scripted_verdict(Scripted(wrong))[0]


KEYS = {"schema_version", "passed", "exit_code", "bundle", "against", "target", "dtype", "checked_dtype", "truth_dtype",
        "provider", "cache", "capacity", "cases", "notes", "versions", "seconds", "max_abs_logits",
        "max_abs_logits_eager", "first"}
CASE_KEYS = {"name", "purpose", "batch", "prompt_lengths", "steps", "free", "kinds", "rows", "top1_agreed", "ties",
             "parted", "eager_logits", "seconds", "passed", "first", "outputs", "trail"}
KIND_KEYS = {"kind", "output", "max_abs", "bound", "yardstick", "basis", "first", "passed", "around"}


def test_the_json_has_the_keys_that_others_rely_on(good, tmp_path):
    """A key that goes missing or changes its meaning is a new SCHEMA_VERSION."""
    write_json(good, tmp_path / "v.json")
    data = json.loads((tmp_path / "v.json").read_text())
    assert SCHEMA_VERSION == data["schema_version"] == 1
    assert set(data) == KEYS
    assert all(set(case) == CASE_KEYS for case in data["cases"])
    assert all(set(kind) == KIND_KEYS for case in data["cases"] for kind in case["kinds"])
    assert data["passed"] is True
    assert data["exit_code"] == 0
    assert data["first"] is None
    assert data["max_abs_logits"] == good.max_abs_logits


def test_json_stays_valid_where_numbers_are_not_finite(bad, tmp_path):
    write_json(bad, tmp_path / "v.json")

    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    data = json.loads((tmp_path / "v.json").read_text(), parse_constant=refuse)
    assert data["passed"] is False
    assert data["exit_code"] == 1
    assert data["first"]["max_abs"] == "inf"
    assert data["first"]["got"] == "nan"
    assert data["first"]["axes"] == {"batch": 0, "token": 60, "id": 7}


def test_junit_has_one_test_per_case_and_kind_and_its_failures(bad, tmp_path):
    write_junit(bad, tmp_path / "v.xml")
    suite = ElementTree.parse(tmp_path / "v.xml").getroot()
    failures = [test for test in suite if test.find("failure") is not None]
    assert int(suite.get("tests")) == len(suite) == 4 * len(bad.cases)
    assert int(suite.get("failures")) == len(failures) == 2  # rows of the long and the ragged case reach token 60
    assert [test.get("classname").rsplit(".", 1)[1] for test in failures] == ["long", "ragged"]
    assert {test.get("name") for test in failures} == {"logits"}
    assert "token 60, id 7" in failures[0].find("failure").get("message")


@pytest.mark.parametrize("width", [50, 120])
def test_the_terminal_says_where_it_first_diverged_and_ends_with_the_verdict(bad, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_verdict(bad, console)
    text = console.export_text()
    assert "first divergence: case long, step 13 (decode), logits, batch 0, token 60, id 7: got nan" in text
    assert text.strip().splitlines()[-1].startswith("DIFFERENT: max |logit difference|")


def test_the_last_line_of_a_pass_says_so(good):
    assert details(good)[-1].startswith("PASSED: max |logit difference| to PyTorch float64")
