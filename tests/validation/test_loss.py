"""The loss against another checkpoint: right numbers, limits that fail, and never a pass where nothing was measured."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gqa_models import write_tiny
from refusal import refused
from safetensors.torch import load_file, save_file
from small_text import SENTENCES, byte_tokenizer

import gqa_export as gqa
from gqa_export.compare.loss import LossTally
from gqa_export.errors import GqaExportError, InvalidCheckpoint, OutputDiffers
from gqa_export.report.baseline import Baseline
from gqa_export.report.console import details
from gqa_export.report.github import markdown
from gqa_export.report.html import page
from gqa_export.report.json_schema import text as json_text
from gqa_export.report.junit import text as junit_text
from gqa_export.report.outcome import Outcome
from gqa_export.validation.loss import SHIPPED, LossRequest
from gqa_export.validation.validate import validate

pytestmark = pytest.mark.whole_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = write_tiny("llama", tmp_path_factory.mktemp("ck"), num_hidden_layers=2)
    byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def other(checkpoint, tmp_path_factory) -> Path:
    """The checkpoint with other last weights: what was before the bundle was "quantized"."""
    folder = tmp_path_factory.mktemp("other") / "other"
    shutil.copytree(checkpoint, folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    torch.manual_seed(1)
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name] + 0.2 * torch.randn_like(weights[name])
    save_file(weights, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    return gqa.export(checkpoint, tmp_path_factory.mktemp("b") / "bundle", capacity=64)


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("".join(SENTENCES))
    return path


@pytest.fixture(scope="module")
def verdict(bundle, checkpoint, other, book):
    return bundle.validate(checkpoint, steps=2, reference=other, text=book)


def expected_loss(checkpoint: Path, other: Path, text: str, window: int) -> tuple[float, float, float, float]:
    """Mean KL, top-1, perplexity of the reference and of the bundle's model, by PyTorch alone."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    sides = [AutoModelForCausalLM.from_pretrained(folder).double().eval() for folder in (other, checkpoint)]
    ids = torch.tensor([Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text).ids])
    kl, same, losses, count = 0.0, 0, [0.0, 0.0], 0
    for start in range(0, ids.shape[1], window):
        piece = ids[:, start: start + window]
        if piece.shape[1] < 2:
            continue
        with torch.no_grad():
            a, b = (torch.log_softmax(side(piece).logits[0, :-1].double(), -1) for side in sides)
        kl += float((a.exp() * (a - b)).sum())
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        for place, side in enumerate((a, b)):
            losses[place] -= float(side.gather(1, piece[0, 1:, None]).sum())
        count += piece.shape[1] - 1
    return kl / count, same / count, *(float(np.exp(loss / count)) for loss in losses)


def test_the_loss_is_what_pytorch_alone_computes(verdict, checkpoint, other, book):
    kl, same, before, after = expected_loss(checkpoint, other, book.read_text(), 64)
    loss = verdict.loss
    assert verdict.passed
    assert loss.kl_mean == pytest.approx(kl, rel=1e-3)
    assert loss.kl_mean > 1e-3
    assert loss.top1 == pytest.approx(same)
    assert (loss.perplexity_reference, loss.perplexity) == pytest.approx((before, after), rel=1e-4)
    assert loss.perplexity_increase == pytest.approx(100 * (after / before - 1), rel=1e-2)
    assert loss.kl_mean <= loss.kl_p99 <= loss.kl_max
    assert "loss" in verdict.compared
    assert loss.text == "book.txt"


@pytest.mark.parametrize(("limits", "good"), [
    ({"max_kl": 2.0}, True), ({"max_kl": 0.5}, False), ({"max_perplexity_increase": -0.0}, True),
    ({"max_kl": 1}, True)], ids=str)
def test_limits_fail_the_verdict_and_only_they_do(verdict, limits, good):
    loss = replace(verdict.loss, kl_mean=1.0, kl_p99=1.5, kl_max=2.0, perplexity=9.0, perplexity_reference=10.0,
                   limit_kl=limits.get("max_kl"), limit_perplexity_increase=limits.get("max_perplexity_increase"))
    judged = replace(verdict, loss=loss)
    assert (judged.passed, judged.exit_code, judged.same) == (good, 0 if good else 1, True)
    with nullcontext() if good else refused("E-VALIDATE-LOSS", OutputDiffers):
        judged.check()
    run = Outcome(("b",), "c", (judged,))
    assert run.word == ("PASSED" if good else "LOSS")
    assert ("--max-kl" in judged.failure) != good


@pytest.mark.parametrize("change", [{"kl_mean": float("nan")}, {"kl_max": float("inf")}, {"perplexity": float("inf")}],
                         ids=str)
def test_a_loss_that_is_not_finite_never_passes(verdict, change):
    assert not replace(verdict, loss=replace(verdict.loss, **change)).passed


def test_a_perplexity_over_its_limit_fails(verdict):
    loss = replace(verdict.loss, perplexity_reference=10.0, perplexity=10.3)
    assert replace(loss, limit_perplexity_increase=3.1).passed
    assert "--max-perplexity-increase" in replace(loss, limit_perplexity_increase=2.9).failure


def test_every_report_tells_the_loss_or_that_there_is_none(verdict):
    lost = replace(verdict, loss=replace(verdict.loss, limit_kl=0.0))
    for judged, word in ((verdict, "KL mean"), (replace(verdict, loss=None), "not measured"), (lost, "--max-kl")):
        run = Outcome(("b",), "c", (judged,))
        texts = {"console": "\n".join(details(judged)), "github": markdown(run).replace("\\", ""), "html": page(run),
                 "junit": junit_text(run), "json": json_text(run)}
        assert all(word in text for text in texts.values()), {name: word in text for name, text in texts.items()}
    data = json.loads(json_text(Outcome(("b",), "c", (lost,))))
    assert (data["passed"], data["exit_code"], data["loss"]["passed"]) == (False, 1, False)
    assert json.loads(json_text(Outcome(("b",), "c", (replace(verdict, loss=None),))))["loss"] is None
    assert 'failures="1"' in junit_text(Outcome(("b",), "c", (lost,)))
    assert 'name="loss" value="not measured' in junit_text(Outcome(("b",), "c", (replace(verdict, loss=None),)))


def test_the_loss_of_the_checkpoint_itself_is_rounding(bundle, checkpoint):
    loss = bundle.validate(checkpoint, steps=2, reference=checkpoint, max_kl=1e-6).check().loss
    assert loss.reference_dtype == "float64"
    assert loss.text == "the shipped text"
    assert loss.kl_mean < 1e-9
    assert loss.tokens == 2048 // 64 * 63  # windows of the bundle's capacity


def test_a_model_in_memory_is_a_reference_too(bundle, checkpoint, other, book, verdict):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(other)
    loss = bundle.validate(checkpoint, steps=2, reference=model, text=book).loss
    assert loss.kl_mean == pytest.approx(verdict.loss.kl_mean, rel=1e-4)


@pytest.mark.parametrize(("options", "code"), [
    ({"max_kl": 0.1}, "E-OPTION-REFERENCE"), ({"max_perplexity_increase": 1.0}, "E-OPTION-REFERENCE"),
    ({"max_kl": -1.0}, "E-OPTION-LIMIT"), ({"max_kl": float("nan")}, "E-OPTION-LIMIT"),
    ({"max_perplexity_increase": float("inf")}, "E-OPTION-LIMIT")], ids=str)
def test_limits_without_meaning_are_refused_before_the_work(bundle, options, code):
    reference = {"reference": "nowhere"} if code == "E-OPTION-LIMIT" else {}
    with refused(code):
        bundle.validate("nowhere", **options, **reference)


def test_another_vocabulary_and_a_reference_that_is_not_there_are_refused_before_the_work(bundle, checkpoint, tmp_path):
    """The checkpoint to compare with is never opened: it is nowhere."""
    def measure(reference, text=None):
        validate(bundle.folder, "nowhere/at/all", steps=2, loss=LossRequest(reference, text))

    wide = write_tiny("llama", tmp_path / "wide", num_hidden_layers=2, vocab_size=300)
    with refused("E-VALIDATE-REFERENCE"):
        measure(wide)
    (tmp_path / "empty").mkdir()
    with refused("E-CKPT-NO-CONFIG", InvalidCheckpoint):
        measure(tmp_path / "empty")
    with refused("E-OPTION-TEXT-FILE"):
        measure(checkpoint, tmp_path / "missing.txt")


def test_a_reference_whose_logits_are_nan_is_refused(bundle, checkpoint, other, tmp_path):
    shutil.copytree(other, tmp_path / "nan")
    path = tmp_path / "nan" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    save_file(weights, path, {"format": "pt"})
    with refused("E-CKPT-NAN", InvalidCheckpoint):
        bundle.validate(checkpoint, steps=2, reference=tmp_path / "nan")


def test_a_bundle_without_tokenizer_cannot_be_measured(checkpoint, other, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(checkpoint, plain)
    (plain / "tokenizer.json").unlink()
    (plain / "tokenizer_config.json").unlink()
    bundle = gqa.export(plain, tmp_path / "bundle", capacity=32)
    with refused("E-VALIDATE-TOKENIZER"):
        bundle.validate(plain, steps=2, reference=other)


def test_logits_of_the_last_token_alone_give_the_same_loss(checkpoint, other, book, tmp_path, verdict):
    last = gqa.export(checkpoint, tmp_path / "last", capacity=64, logits="last")
    loss = last.validate(checkpoint, steps=2, reference=other, text=book).loss
    assert loss.kl_mean == pytest.approx(verdict.loss.kl_mean, rel=1e-3)
    assert loss.tokens == verdict.loss.tokens


def test_the_command_ends_with_1_where_too_much_was_lost(program, bundle, checkpoint, other, book, tmp_path):
    report = tmp_path / "verdict.json"
    done = program("validate", bundle.folder, "--against", checkpoint, "--reference", other, "--text", book,
                   "--steps", 2, "--max-kl", "1e-9", "--json", report)
    assert done.returncode == 1, done.stderr
    assert "LOST TOO MUCH" in done.stdout
    assert json.loads(report.read_text())["loss"]["limit_kl"] == 1e-9
    done = program("validate", bundle.folder, bundle.folder, "--max-kl", "1")
    assert done.returncode == 2
    assert "--against" in done.stderr


def test_a_baseline_keeps_the_loss(verdict, tmp_path):
    path = tmp_path / "baseline.json"
    Baseline.update(path, [verdict])
    assert Baseline.read(path).judge([verdict])[0] == ()
    worse = replace(verdict.loss, kl_mean=verdict.loss.kl_mean * 2.1)
    for loss, word in ((None, "not measured"), (worse, "KL"), (replace(verdict.loss, text_sha256="other"), "tokens"),
                       (replace(verdict.loss, perplexity=3 * verdict.loss.perplexity), "perplexity")):
        drifts, _ = Baseline.read(path).judge([replace(verdict, loss=loss)])
        assert len(drifts) == 1, drifts
        assert word in str(drifts[0])
    data = json.loads(path.read_text())
    next(iter(data["bundles"].values()))["loss"]["kl_mean"] = "much"
    path.write_text(json.dumps(data))
    with refused("E-REPORT-BASELINE-FORMAT", GqaExportError):
        Baseline.read(path)


def test_pieces_of_a_window_give_what_the_whole_gives():
    random = np.random.default_rng(4)
    ids, a, b = random.integers(0, 17, 90), random.normal(size=(90, 17)), random.normal(size=(90, 17))
    found = []
    for size in (90, 7, 1):
        tally = LossTally()
        tally.begin()
        for start in range(0, 90, size):
            tally.add(ids[start: start + size], a[start: start + size], b[start: start + size])
        found.append(tally.loss("r", "float64", "t", "", 1, None, None))
    for one in found[1:]:
        assert one.tokens == found[0].tokens == 89
        assert (one.kl_mean, one.perplexity, one.top1) == pytest.approx(
            (found[0].kl_mean, found[0].perplexity, found[0].top1))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_infinite_loss(value):
    tally, wrong = LossTally(), np.zeros((3, 5))
    wrong[1, 2] = value
    tally.begin()
    tally.add(np.array([1, 2, 3]), np.zeros((3, 5)), wrong)
    assert tally.loss("r", "float64", "t", "", 1, None, None).failure


def test_a_token_held_impossible_adds_nothing():
    expected = np.array([[0.0, -np.inf, 1.0]] * 3)
    tally = LossTally()
    tally.begin()
    tally.add(np.array([0, 2, 0]), expected, expected)
    assert tally.loss("r", "float64", "t", "", 1, None, None).kl_mean == 0


def test_the_shipped_text_is_plain():
    text = SHIPPED.read_text(encoding="utf-8")
    assert text.isascii()
    assert 4096 < len(text) < 8192
