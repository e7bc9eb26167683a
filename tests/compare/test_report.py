"""What a verdict is to a program and on the terminal. Files: tests/report."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from refusal import refused
from rich.console import Console

from gqa_export.compare.case_verdict import KindVerdict, Location
from gqa_export.errors import OutputDiffers
from gqa_export.report.console import details, print_verdict

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


@pytest.mark.parametrize("width", [50, 120])
def test_the_terminal_says_where_it_first_diverged_and_ends_with_the_verdict(bad, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_verdict(bad, console)
    text = console.export_text()
    assert "first divergence: case teacher_forced, step 13 (decode), logits, batch 0, token 60, id 7: got nan" in text
    assert text.strip().splitlines()[-1].startswith("DIFFERENT: max |logit difference|")


def shown(verdict, **options) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_verdict(verdict, console, **options)
    return console.export_text()


def with_refusals(verdict, wrong: bool = False):
    """The verdict and a last case of five calls that must be refused."""
    kinds = tuple(KindVerdict("refusal", f"call {number}", 0.0, 0.0, 0.0, "floor", None) for number in range(5))
    if wrong:
        place = Location("refusals", 0, "refusal", "call 3", {}, 0.0, 0.0, 1.0, 0.0)
        kinds = (*kinds[:3], replace(kinds[3], max_abs=1.0, first=place), kinds[4])
    case = replace(verdict.cases[0], name="refusals", kinds=kinds, rows=0, top1_agreed=0, ties=(), parted=None)
    return replace(verdict, cases=(*verdict.cases, case))


def test_rows_that_are_equal_are_one_with_their_number(good):
    lines = [line for line in shown(with_refusals(good)).splitlines() if "refusal" in line and "compared" not in line]
    assert len(lines) == 1
    assert "refusal (5)" in lines[0]


def test_a_row_that_differs_is_never_folded_away(good):
    lines = [line for line in shown(with_refusals(good, wrong=True), short=True).splitlines() if "refusal " in line]
    assert [("DIFFERS" in line, "(3)" in line) for line in lines if "0.00e+00" in line or "1.00e+00" in line] == [
        (False, True), (True, False), (False, False)]


def test_a_pass_in_short_is_a_line_for_each_kind_and_a_failure_is_never_short(good, bad):
    text = shown(with_refusals(good), short=True)
    assert "first divergence" not in text
    kinds = {kind.kind for case in good.cases for kind in case.kinds}
    assert [line.split(":")[0].strip() for line in text.splitlines() if "max |difference|" in line] == [
        kind.kind for kind in good.cases[0].kinds]
    assert "5 calls that must be refused were refused" in text
    assert len(text.splitlines()) <= len(kinds) + 4
    assert text.strip().splitlines()[-1].startswith("PASSED")
    assert shown(bad, short=True) == shown(bad)


def test_the_last_line_of_a_pass_says_so(good):
    assert details(good)[-1].startswith("PASSED: max |logit difference| to PyTorch float64")


def test_a_verdict_names_what_was_compared_and_nothing_else(good):
    assert good.compared == ("logits", "new keys and values", "cache", "best tokens")
    forced = replace(good, cases=good.cases[:1])
    assert forced.compared == ("logits", "new keys and values", "cache")
    case = good.cases[0]
    logits = replace(case, kinds=tuple(kind for kind in case.kinds if kind.kind in ("logits", "keys")))
    assert replace(good, cases=(logits,)).compared == ("logits",)
    assert replace(good, cases=()).compared == ()
    assert "compared: logits, new keys and values, cache, best tokens" in details(good)
    assert "compared: nothing" in details(replace(good, cases=()))


def test_check_gives_a_verdict_that_passed_and_raises_for_one_that_did_not(good, bad):
    assert good.check() is good
    assert good.failure == ""
    with refused("E-VALIDATE-DIFFERS", OutputDiffers) as refusal:
        replace(bad, bundle="out", against="org/name").check()
    assert "case teacher_forced, step 13 (decode), logits, batch 0, token 60" in refusal.error.what
    assert (refusal.error.where, refusal.error.exit_code) == ("out", 1)
    assert "gqa-export bisect out --against org/name" in refusal.error.fix
    with refused("E-VALIDATE-DIFFERS", OutputDiffers) as refusal:
        replace(good, cases=()).check()
    assert "no case was run" in refusal.error.what


def test_a_verdict_as_json_is_its_plain_data(bad):
    assert json.loads(bad.to_json()) == bad.to_dict()
    assert bad.to_dict()["compared"] == ["logits", "new keys and values", "cache", "best tokens"]
