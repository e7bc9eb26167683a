"""What approximate attention costs is a part of `validate`: measured on a text, shown by every report, held to bounds,
and never passed where it was not measured."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from gqa_models import write_tiny
from refusal import refused
from report.schema import misfit
from rich.console import Console
from small_text import SENTENCES, byte_tokenizer

import gqa_export as gqa
from gqa_export.cli import main
from gqa_export.compare.verdict import Verdict
from gqa_export.errors import OutputDiffers
from gqa_export.exporting.long_plan import LongOptions
from gqa_export.report import github, html, json_schema, junit
from gqa_export.report.console import print_verdict
from gqa_export.report.outcome import Outcome

LONG = LongOptions("tiles", "last:2", leaf=64, heavy=64, samples=16, anchors=3, from_tokens=128)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    place = write_tiny("llama", tmp_path_factory.mktemp("long") / "llama")
    byte_tokenizer(place)
    (place / "text.txt").write_text("".join(SENTENCES) * 10)
    (place / "short.txt").write_text("A few words.")
    return place


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory) -> gqa.Bundle:
    return gqa.export(checkpoint, tmp_path_factory.mktemp("bundle") / "long", long_attention=LONG)


@pytest.fixture(scope="module")
def plain(checkpoint, tmp_path_factory) -> gqa.Bundle:
    return gqa.export(checkpoint, tmp_path_factory.mktemp("bundle") / "plain")


@pytest.fixture(scope="module")
def measured(bundle, checkpoint) -> Verdict:
    return bundle.validate(checkpoint, steps=1, text=checkpoint / "text.txt", max_loss=100, lengths=(256, 320))


@pytest.fixture(scope="module")
def unmeasured(bundle, checkpoint) -> Verdict:
    return bundle.validate(checkpoint, steps=1)


def outcome(verdict: Verdict) -> Outcome:
    return Outcome((verdict.bundle,), verdict.against, (verdict,))


def shown(verdict: Verdict) -> str:
    page = StringIO()
    print_verdict(verdict, Console(file=page, width=80))
    return page.getvalue()


def long_cases(verdict: Verdict) -> dict[str, bool]:
    """Test cases about long prompts in the JUnit report, and whether each failed."""
    root = ElementTree.fromstring(junit.text(outcome(verdict)))
    return {f"{test.get('classname')}.{test.get('name')}": test.find("failure") is not None
            for test in root.iter("testcase") if test.get("classname").startswith("gqa_export.validate.long.")}


def test_every_report_shows_what_was_measured(measured) -> None:
    assert measured.passed
    assert "loss on long prompts" in measured.compared
    words = shown(measured)
    for each in measured.long.lengths:
        assert f"{each.perplexity:.3f}" in words
        assert f"{each.kl:.4f}" in words
        assert all(f"{share:.3f}" in words for share in each.top1_by_position)
        for layer in each.layers:
            figures = (f"{layer.error:.4f}", f"{layer.error_p99:.4f}", f"{layer.mass:.3f}", f"{layer.alpha:.3g}",
                       f"{layer.log_kappa:.1f}", f"{layer.seconds:.3f}")
            assert all(figure in words for figure in figures)
    document = json.loads(json_schema.text(outcome(measured)))
    assert misfit(document, unknown_keys=False) == ""
    assert [row["tokens"] for row in document["long"]["lengths"]] == [256, 320]
    assert document["long"]["passed"]
    page = html.page(outcome(measured))
    assert page.count('class="long"') == 4, "seconds over length, loss over layers, error over layers twice"
    assert "svg.long polyline" in page
    assert long_cases(measured) == {"gqa_export.validate.long.256.loss": False,
                                    "gqa_export.validate.long.320.loss": False}
    assert "long prompts: tiles: 256 tokens" in github.markdown(outcome(measured)).replace("\\", "")


def test_what_was_not_measured_is_called_so_and_is_no_test(unmeasured) -> None:
    assert unmeasured.passed
    assert unmeasured.long is None
    assert "loss on long prompts" not in unmeasured.compared
    label = "not measured (--text FILE measures it)"
    assert f"long prompts: {label}" in shown(unmeasured)
    assert label in html.page(outcome(unmeasured))
    document = json.loads(json_schema.text(outcome(unmeasured)))
    assert (document["long"], document["long_label"], document["approximated"]) == (None, label, "tiles")
    assert misfit(document, unknown_keys=False) == ""
    assert long_cases(unmeasured) == {}
    properties = ElementTree.fromstring(junit.text(outcome(unmeasured))).iter("property")
    assert {each.get("name"): each.get("value") for each in properties}["long prompts"] == label


def test_a_loss_beyond_its_bound_fails_and_says_how_much(measured) -> None:
    bad = replace(measured, long=replace(measured.long, max_loss=-10.0))
    assert (bad.same, bad.passed, bad.exit_code, outcome(bad).word) == (True, False, 1, "LOSS")
    assert "beyond --max-loss -10" in bad.failure
    assert f"LOST TOO MUCH: {bad.failure}" in shown(bad)
    assert bad.failure in html.page(outcome(bad))
    assert bad.failure in json.loads(json_schema.text(outcome(bad)))["long"]["failures"]
    assert all(long_cases(bad).values())
    with refused("E-VALIDATE-LONG-LOSS", OutputDiffers):
        bad.check()


def test_a_copy_score_that_cannot_be_judged_fails_the_bound_that_was_asked_for(bundle, checkpoint, tmp_path) -> None:
    """A model of random weights gains nothing on a passage that it has seen."""
    done = CliRunner().invoke(main, ["validate", str(bundle.folder), "--against", str(checkpoint), "--steps", "1",
                                     "--text", str(checkpoint / "text.txt"), "--min-copy", "0.5",
                                     "--junit", str(tmp_path / "out.xml")])
    assert done.exit_code == 1, done.output
    assert "LOST TOO MUCH: 256 tokens: the exact model gains less than 0.1 nats" in done.output
    failed = ElementTree.parse(tmp_path / "out.xml").findall(".//failure")
    assert len(failed) == 1


def test_a_bundle_without_long_prompts_says_nothing_of_them(plain, checkpoint) -> None:
    verdict = plain.validate(checkpoint, steps=1, text=checkpoint / "text.txt")
    assert (verdict.passed, verdict.approximated, verdict.long, verdict.long_label) == (True, "", None, "")
    assert "long prompts" not in shown(verdict) + html.page(outcome(verdict)) + junit.text(outcome(verdict))


def test_a_text_that_is_too_short_is_told_and_refused_only_where_a_bound_was_given(bundle, checkpoint) -> None:
    text = checkpoint / "short.txt"
    verdict = bundle.validate(checkpoint, steps=1, text=text)
    assert verdict.passed
    assert verdict.long is None
    assert "148 are needed" in verdict.long_label
    with refused("E-OPTION-LENGTHS"):
        bundle.validate(checkpoint, steps=1, text=text, max_loss=0.1)
    with refused("E-FILE-TEXT-SHORT"):
        bundle.validate(checkpoint, steps=1, text=text, lengths=(256,))


@pytest.mark.parametrize(("options", "code"), [
    ({"max_loss": 0.1}, "E-OPTION-LONG-LIMIT"), ({"min_copy": 0.9}, "E-OPTION-LONG-LIMIT"),
    ({"lengths": (256,)}, "E-OPTION-LONG-LIMIT"), ({"max_loss": -0.1, "text": "text.txt"}, "E-OPTION-LONG-LIMIT"),
    ({"max_loss": float("nan"), "text": "text.txt"}, "E-OPTION-LONG-LIMIT"),
    ({"min_copy": 90.0, "text": "text.txt"}, "E-OPTION-LONG-LIMIT"),
    ({"lengths": (0,), "text": "text.txt"}, "E-OPTION-LENGTHS"),
    ({"lengths": (256, 1 << 20), "text": "text.txt"}, "E-OPTION-LENGTHS"),
    ({"lengths": (130,), "text": "text.txt"}, "E-OPTION-LENGTHS")], ids=str)
def test_what_cannot_be_measured_is_refused_before_the_work(bundle, checkpoint, options, code, monkeypatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the work had begun")

    monkeypatch.setattr("gqa_export.validation.validate.open_reference", never)
    if "text" in options:
        options = {**options, "text": checkpoint / options["text"]}
    with refused(code):
        bundle.validate(checkpoint, **options)


def test_a_bound_for_a_bundle_that_approximates_nothing_is_refused(plain, checkpoint) -> None:
    with refused("E-OPTION-LONG-LIMIT") as found:
        plain.validate(checkpoint, text=checkpoint / "text.txt", max_loss=0.1)
    assert "--long-attention" in found.error.fix


def test_bounds_need_a_checkpoint_to_measure(bundle) -> None:
    done = CliRunner().invoke(main, ["validate", str(bundle.folder), str(bundle.folder), "--max-loss", "0.1"])
    assert done.exit_code == 2
    assert "--against" in done.output
