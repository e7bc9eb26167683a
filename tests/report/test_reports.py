"""What a verdict looks like on paper: stable JSON, JUnit, a page that needs nothing else, a summary, a baseline."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from refusal import refused

from gqa_export.compare.verdict import SCHEMA_VERSION
from gqa_export.errors import GqaExportError, NotCheckedHere
from gqa_export.files.write_text import write_text
from gqa_export.report import outcome as outcome_module
from gqa_export.report.baseline import Baseline, key_of
from gqa_export.report.github import markdown
from gqa_export.report.html import page
from gqa_export.report.json_schema import text as json_text
from gqa_export.report.junit import text as junit_text
from gqa_export.report.outcome import Outcome
from gqa_export.report.reports import Reports

from .schema import misfit

NASTY = "<script>alert('x')</script>\x00\x1b[31m\ud800 & \"quoted\" | # `code` [link](http://evil)\nnew line"
VOID = {"meta", "link", "br", "input", "img", "hr"}


def outcome(*verdicts, **rest) -> Outcome:
    return Outcome(tuple(verdict.bundle for verdict in verdicts) or ("some-bundle",), "checkpoint", verdicts, **rest)


def strict(text: str):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def problem(kind=GqaExportError) -> Outcome:
    return outcome(problem=kind("the cause", "the place", "the fix"))


class Page(HTMLParser):
    """Checks that tags nest, and gathers what a test looks at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}>"

    def handle_data(self, data):
        self.words += data

    def of(self, tag: str, kind: str = "") -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag and kind in (attrs.get("class") or "")]


@pytest.mark.parametrize("several", [False, True])
def test_json_follows_the_schema_that_others_rely_on(good, bad, several):
    """A key that goes or changes its meaning is a new SCHEMA_VERSION."""
    data = strict(json_text(outcome(good, bad) if several else outcome(bad)))
    assert misfit(data, unknown_keys=False) == ""
    assert SCHEMA_VERSION == data["schema_version"] == 2
    assert (data["passed"], data["exit_code"]) == (False, 1)
    assert len(data["verdicts"]) == 2 if several else data["bundle"] == bad.bundle


def test_the_schema_notices_a_key_that_goes_and_one_that_changes(good):
    data = strict(json_text(outcome(good)))
    without = {key: value for key, value in data.items() if key != "max_abs_logits"}
    assert misfit(without) == "max_abs_logits: Field required"
    assert misfit({**data, "capacity": "128"}) == "capacity: Input should be a valid integer"
    assert misfit({**data, "added": 1}) == ""
    assert misfit({**data, "added": 1}, unknown_keys=False) == "added: Extra inputs are not permitted"
    data["cases"][0]["kinds"][0].pop("bound")
    assert misfit(data) == "cases.0.kinds.0.bound: Field required"


def test_json_says_in_words_what_is_not_finite(bad):
    data = strict(json_text(outcome(bad)))
    assert data["first"]["output"] == "layer 0 key"
    logits = next(kind for kind in data["cases"][0]["kinds"] if kind["kind"] == "logits")
    assert (logits["max_abs"], logits["first"]["got"], logits["first"]["axes"]) == ("inf", "nan",
                                                                                    {"batch": 0, "token": 60, "id": 7})


@pytest.mark.parametrize(("kind", "code"), [(GqaExportError, 2), (NotCheckedHere, 3)])
def test_a_run_without_a_verdict_is_told_by_every_report_and_never_as_a_pass(kind, code):
    found = problem(kind)
    data = strict(json_text(found))
    assert misfit(data, unknown_keys=False) == ""
    assert (data["passed"], data["exit_code"], data["verdicts"]) == (False, code, [])
    assert data["error"] == {"code": "", "what": "the cause", "where": "the place", "fix": "the fix"}
    root = ElementTree.fromstring(junit_text(found))
    assert (root.get("errors"), root.find("testsuite/testcase/error").get("message")) == ("1", "the cause")
    words = Page(page(found)).words
    assert "the cause" in words
    assert "the fix" in words
    assert "PASSED" not in words
    assert "❌" in markdown(found)


def test_junit_has_one_test_per_case_and_kind_and_counts_them(good, bad):
    root = ElementTree.fromstring(junit_text(outcome(good, bad)))
    assert root.tag == "testsuites"
    assert [suite.tag for suite in root] == ["testsuite"] * 2
    for element in (root, *root):
        tests = list(element.iter("testcase"))
        assert int(element.get("tests")) == len(tests)
        assert int(element.get("failures")) == sum(test.find("failure") is not None for test in tests)
        assert int(element.get("errors")) == 0
        assert float(element.get("time")) >= 0
    assert root[0].get("failures") == "0"
    assert len(list(root[0].iter("testcase"))) == sum(len(case.kinds) for case in good.cases)
    for test in root.iter("testcase"):
        assert test.get("name")
        assert test.get("classname").startswith("gqa_export.validate.")
        assert float(test.get("time")) >= 0
    logits = next(test for test in root[1].iter("testcase") if test.get("name") == "logits")
    assert "token 60, id 7" in logits.find("failure").get("message")
    properties = {p.get("name"): p.get("value") for p in root[0].find("properties")}
    assert properties.keys() >= {"target", "against", "python"}
    assert properties["compared"] == ", ".join(good.compared)


def test_every_report_tells_what_was_compared(good):
    found, words = outcome(good), ", ".join(good.compared)
    assert "new keys and values" in words
    assert strict(json_text(found))["compared"] == list(good.compared)
    assert words in Page(page(found)).words
    assert f"compared: {words}" in markdown(found)


def test_the_page_is_whole_draws_every_case_and_needs_nothing_else(good, bad):
    text = page(outcome(good, bad))
    found = Page(text)
    assert len(found.of("svg", "plot")) == 2 * (len(good.cases) + len(bad.cases))
    assert not [tag for tag, _ in found.tags if tag in ("script", "link", "img", "iframe", "object", "base", "form")]
    assert not [attrs for _, attrs in found.tags if {"src", "href", "srcset"} & set(attrs)]
    assert not re.search(r"url\(|@import|https?://", text)
    policy = next(attrs["content"] for attrs in found.of("meta") if "Content-Security-Policy" in attrs.values())
    assert policy.startswith("default-src 'none'")
    assert "DIFFERENT" in found.words
    assert "python" in found.words
    assert "first divergence: case teacher_forced" in found.words


def test_the_page_shows_both_sides_around_the_worst_element(bad):
    found = Page(page(outcome(bad)))
    assert found.of("td", "centre")
    kind = next(kind for kind in bad.cases[0].kinds if kind.kind == "keys")
    around = kind.around
    row, column = around.centre
    gap = abs(around.expected[row][column] - around.got[row][column])
    assert gap == pytest.approx(kind.max_abs)
    assert (around.tokens[row], around.axes["head"], around.first_feature + column) == (50, 1, 2)
    assert f"{around.expected[row][column]:.6g}" in found.words
    assert f"{around.got[row][column]:.6g}" in found.words


def test_points_of_a_plot_above_the_bound_are_marked(good, bad):
    assert not Page(page(outcome(good))).of("circle", "bad")
    marked = Page(page(outcome(bad))).of("circle", "bad")
    assert {word for attrs in marked for word in attrs["class"].split()} >= {"keys", "logits"}
    for attrs in marked:
        assert all(0 <= float(attrs[name]) <= 600 for name in ("cx", "cy"))


def test_names_from_outside_are_shown_never_obeyed(bad):
    found = outcome(replace(bad, bundle=f"/x/{NASTY}", against=NASTY, notes=(NASTY,)), notes=(NASTY,))
    assert not Page(page(found)).of("script")
    ElementTree.fromstring(junit_text(found).encode("utf-8", "strict"))
    strict(json_text(found)).keys()
    table = markdown(found)
    assert "<script>" not in table
    assert "[link](" not in table
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == 1 + 4 * len(bad.cases)


def test_the_summary_is_appended_and_refused_outside_of_a_step(good, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "summary.md").write_text("before\n")
    wanted = Reports(github=True)
    wanted.check()
    assert wanted.finish(["bundle"], "checkpoint", [good]).exit_code == 0
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("before\n## ✅ gqa-export validate: PASSED")
    assert text.count("| ok |") == 4 * len(good.cases)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    with refused("E-REPORT-GITHUB"):
        wanted.check()


def worse(verdict, factor: float, kind: str = "logits"):
    """The verdict with the errors of one kind in its first case multiplied: still within the tolerance."""
    case = verdict.cases[0]
    kinds = tuple(replace(each, max_abs=each.max_abs * factor) if each.kind == kind else each for each in case.kinds)
    return replace(verdict, cases=(replace(case, kinds=kinds), *verdict.cases[1:]))


def test_a_drift_within_the_tolerance_fails(good, tmp_path):
    file = tmp_path / "baseline.json"
    kept = Reports(baseline=file, update_baseline=True)
    kept.check()
    assert kept.finish(["b"], "c", [good]).exit_code == 0
    wanted = Reports(baseline=file)
    wanted.check()
    assert wanted.finish(["b"], "c", [good]).exit_code == 0
    assert wanted.finish(["b"], "c", [worse(good, 1.5)]).exit_code == 0  # another machine's rounding
    drifted = worse(good, 3)
    assert drifted.passed
    found = wanted.finish(["b"], "c", [drifted])
    assert (found.exit_code, found.word, len(found.drifts)) == (1, "DRIFTED", 1)
    assert "case teacher_forced, logits are off by" in str(found.drifts[0])
    root = ElementTree.fromstring(junit_text(found))
    assert root.get("failures") == "1"
    assert "DRIFTED" in Page(page(found)).words
    assert strict(json_text(found))["drifts"] == [str(found.drifts[0])]
    assert "drift" in markdown(found)


def test_fewer_best_tokens_and_a_case_that_is_gone_are_drifts_a_new_case_is_a_note(good, tmp_path):
    Baseline.update(tmp_path / "b.json", [good])
    known = Baseline.read(tmp_path / "b.json")
    fewer = replace(good, cases=(replace(good.cases[0], top1_agreed=good.cases[0].top1_agreed - 1), *good.cases[1:]))
    assert "best tokens agree" in str(known.judge([fewer])[0][0])
    gone, _ = known.judge([replace(good, cases=good.cases[1:])])
    assert [drift.message for drift in gone] == ["it is in the baseline and was not run"]
    new = replace(good, cases=(*good.cases, replace(good.cases[0], name="new")))
    assert known.judge([new]) == ((), (f"the baseline does not contain case new of {key_of(good)}",))


def test_noise_far_below_the_tolerance_is_no_drift(good, tmp_path):
    quiet = worse(good, 0)
    Baseline.update(tmp_path / "b.json", [quiet])
    assert not Baseline.read(tmp_path / "b.json").judge([worse(good, 1e-3)])[0]


def test_updating_keeps_other_bundles_and_never_keeps_a_failure(good, bad, tmp_path):
    file = tmp_path / "b.json"
    other = replace(good, bundle="other", target="onnx")
    Baseline.update(file, [good])
    Baseline.update(file, [other])
    before = file.read_text()
    assert set(Baseline.read(file).bundles) == {key_of(good), key_of(other)}
    found = Reports(baseline=file, update_baseline=True).finish(["b"], "c", [bad])
    assert found.exit_code == 1
    assert "left as it was" in found.notes[0]
    assert file.read_text() == before


def test_two_bundles_of_one_folder_name_are_two_and_a_moved_one_is_the_same(good, tmp_path):
    """One digest for each checkpoint and export: `a/model` and `b/model` must not replace one another."""
    file = tmp_path / "b.json"
    one = replace(good, bundle="a/model", identity="1" * 64)
    other = replace(worse(good, 3), bundle="b/model", identity="2" * 64)
    longer = replace(one, capacity=one.capacity * 2)
    twin = replace(one, dtype="bfloat16")  # its fp32 twin is compared: not the fp32 bundle
    Baseline.update(file, [one, other, longer, twin])
    known = Baseline.read(file)
    assert len(known.bundles) == 4
    assert {entry["name"] for entry in known.bundles.values()} == {"model"}
    assert not known.judge([other])[0]
    moved = known.judge([replace(worse(good, 3), bundle="elsewhere/other", identity="1" * 64)])[0]
    assert [str(drift).startswith(f"other {key_of(one)}: case teacher_forced") for drift in moved] == [True]


def test_a_baseline_by_folder_names_is_refused_and_updating_starts_it_anew(good, tmp_path):
    file = tmp_path / "b.json"
    file.write_text(json.dumps({"format": 1, "bundles": {"model (ort, float32, growing, cpu)": {"cases": {}}}}))
    with refused("E-REPORT-BASELINE-OLD") as refusal:
        Reports(baseline=file).check()
    assert "--update-baseline" in refusal.error.fix
    notes = Baseline.update(file, [good])
    assert "dropped" in notes[0]
    assert set(Baseline.read(file).bundles) == {key_of(good)}


@pytest.mark.parametrize("content", [
    "", "[]", "{}", '{"format": 3, "bundles": {}}', '{"format": 2, "bundles": []}',
    '{"format": 2, "bundles": {"a": 3}}',
    '{"format": 2, "bundles": {"a": {"cases": {"c": {"best_tokens": "x", "max_abs": {}}}}}}',
    '{"format": 2, "bundles": {"a": {"cases": {"c": {"best_tokens": "1/2", "max_abs": {"k": NaN}}}}}}',
    '{"format": 2, "bundles": {"a": {"cases": {"c": {"best_tokens": "1/2", "max_abs": {"k": "0"}}}}}}', "[" * 100_000,
], ids=range(10))
def test_a_file_that_is_no_baseline_is_refused_before_the_work(content, tmp_path):
    (tmp_path / "b.json").write_text(content)
    with pytest.raises(GqaExportError) as refusal:
        Reports(baseline=tmp_path / "b.json").check()
    assert refusal.value.code in ("E-REPORT-BASELINE-READ", "E-REPORT-BASELINE-FORMAT")
    assert "--update-baseline" in refusal.value.fix


def test_a_baseline_without_this_bundle_is_refused_and_names_those_it_has(good, tmp_path):
    Baseline.update(tmp_path / "b.json", [good])
    with refused("E-REPORT-BASELINE-BUNDLE") as refusal:
        Baseline.read(tmp_path / "b.json").judge([replace(good, provider="cuda")])
    assert key_of(good) in refusal.error.where


@pytest.mark.parametrize(("options", "code"), [
    ({"update_baseline": True}, "E-OPTION-UPDATE-BASELINE"),
    ({"baseline": "missing.json"}, "E-REPORT-BASELINE-MISSING"),
    ({"html": "no/such/folder/x.html"}, "E-REPORT-FOLDER"),
])
def test_what_cannot_be_written_is_refused_before_the_work(options, code, tmp_path):
    given = {name: tmp_path / value if isinstance(value, str) else value for name, value in options.items()}
    with refused(code):
        Reports(**given).check()


def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "page.html"
    write_text(file, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outcome_module.os, "replace", full)
    with refused("E-FILE-WRITE"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
