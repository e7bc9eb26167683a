"""What approximate attention costs a model, measured in PyTorch: the model is replaced faithfully, bounds are kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gqa_models import write_tiny
from refusal import refused
from small_text import SENTENCES, byte_tokenizer

from gqa_export.checkpoint.load_config import load_config
from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.cli import main
from gqa_export.compare.long_quality import LayerQuality, LengthQuality, LongQuality
from gqa_export.long_attention_op import LongSetting
from gqa_export.long_context import choose as choosing
from gqa_export.long_context.attention import Replacement, load, replaced
from gqa_export.long_context.measure import Measurement, Sequence, longest_length, shortest_length
from gqa_export.progress import silent
from gqa_export.report import long_report
from gqa_export.trace.probe.layer_probe import probe

TILES = LongSetting("tiles", leaf=64, heavy_keys=16, samples=16, anchors=3, tile=16, block=8, score_rows=4)
HYPER = LongSetting("hyper", leaf=64, heavy_keys=16, samples=16, anchors=3)
EVERYTHING = replace(TILES, heavy_keys=512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = write_tiny("llama", tmp_path_factory.mktemp("long") / "llama")
    byte_tokenizer(place)
    (place / "text.txt").write_text("".join(SENTENCES) * 10)
    return place


@pytest.fixture(scope="module")
def measurement(folder) -> Measurement:
    checkpoint = open_checkpoint(folder)
    sequence = Sequence.of(np.random.default_rng(0).integers(3, 320, 400), 320, 64, "text")
    return Measurement(load(checkpoint), probe(load_config(checkpoint)), HYPER, 0, sequence, str(folder))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_oss"])
def test_a_model_that_is_not_approximated_is_the_model_itself(name, tmp_path) -> None:
    checkpoint = open_checkpoint(write_tiny(name, tmp_path / name))
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 300, (1, 90)))
    spec = probe(load_config(checkpoint))
    with torch.inference_mode():
        wanted = load_model(checkpoint, "float32")(input_ids=ids, use_cache=False).logits
        with replaced(Replacement(spec, TILES)) as seen:
            ours = load(checkpoint)(input_ids=ids, use_cache=False).logits
    assert seen.reached == {layer.layer for layer in spec.layers}
    assert (ours - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_reading_every_key_loses_nothing(folder) -> None:
    checkpoint = open_checkpoint(folder)
    sequence = Sequence.of(np.random.default_rng(0).integers(3, 320, 400), 320, 64, "text")
    spec = probe(load_config(checkpoint))
    found = Measurement(load(checkpoint), spec, EVERYTHING, 0, sequence, "").of((0, 1, 2), whole=True)
    assert abs(found.loss) <= 1e-4
    assert abs(found.kl) <= 1e-4
    assert found.top1 == 1
    assert abs(found.copy - found.exact_copy) <= 1e-4


@pytest.mark.parametrize("layers", [(2,), (1, 2), (0, 2)])
def test_a_run_that_starts_where_it_differs_gives_what_a_whole_run_gives(measurement, layers) -> None:
    quick, whole = measurement.of(layers), measurement.of(layers, whole=True)
    assert quick.nll == pytest.approx(whole.nll, abs=1e-6)
    assert quick.copy == pytest.approx(whole.copy, abs=1e-6)
    assert quick.loss != 0


def test_layers_are_chosen_within_the_bounds_and_measured_together(measurement) -> None:
    everything = choosing.choose(measurement, max_loss=100, min_copy=-100, report=silent)
    assert everything.layers == (0, 1, 2)
    bound = sorted(abs(found.loss) for found in everything.alone.values())[0] + 1e-6
    some = choosing.choose(measurement, max_loss=bound, min_copy=-100, report=silent)
    assert some.quality.loss <= bound
    assert some.quality.nll == pytest.approx(measurement.of(some.layers).nll, abs=1e-6)
    if all(found.loss > 0 for found in everything.alone.values()):
        with refused("E-OPTION-LONG-BOUNDS"):
            choosing.choose(measurement, max_loss=0, min_copy=-100, report=silent)


def length(**changes: float) -> LengthQuality:
    facts = {"tokens": 4096, "exact_nll": 3.5, "nll": 3.51, "kl": 0.01, "top1": 0.9, "top1_by_position": (0.9,) * 8,
             "unseen": 3.67, "exact_copy": 0.83, "copy": 0.93, "exact_seconds": 2.0, "seconds": 1.0, **changes}
    return LengthQuality(**facts)


def quality(each: LengthQuality, anchors: int = 4) -> LongQuality:
    return LongQuality("a & b", "<text>", "hyper", {"method": 1, "anchors": anchors}, 0, (1, 2), 0.05, 0.9, (each,))


@pytest.mark.parametrize(("changes", "words"), [
    ({}, []), ({"nll": 3.56}, ["--max-loss"]), ({"copy": 1.2}, ["--min-copy"]), ({"nll": math.nan}, ["--max-loss"]),
    ({"nll": 4.5, "copy": 3.6}, ["--max-loss", "--min-copy"]), ({"unseen": 0.85, "copy": 5.0}, [])])
def test_bounds(changes, words) -> None:
    found = quality(length(**changes))
    assert [word for word in ("--max-loss", "--min-copy") if any(word in line for line in found.failures)] == words
    assert found.passed == (not words)
    document = ElementTree.fromstring(long_report.junit(found))
    assert int(document.get("failures")) == len(document.findall(".//failure")) == len(found.failures)


def test_a_failure_names_alpha_and_its_column() -> None:
    layer = LayerQuality(20, 0.6, 2.0, 0.4, 1.6e6, 0, 3e3, 9.0, 0.1, 0.4)
    found = quality(length(nll=4.5, layers=(layer,)), anchors=0).failures[0]
    assert "alpha of layer 20 is 1.6e+06 in column 0" in found
    assert "--long-anchors 4" in found


def test_perplexity_is_natural_and_the_copy_score_is_a_share() -> None:
    each = length()
    assert each.perplexity == pytest.approx(math.exp(3.51))
    assert each.copy_score == pytest.approx((3.67 - 0.93) / (3.67 - 0.83))
    assert length(unseen=0.9).copy_score is None


def test_the_page_escapes_what_is_from_outside() -> None:
    page = long_report.html(quality(length()))
    assert "a &amp; b" in page
    assert "<text>" not in page


@pytest.mark.parametrize(("bound", "code"), [("100", 0), ("0", 1)])
def test_the_command_writes_reports_and_tells_by_its_exit_code(folder, tmp_path, bound, code) -> None:
    names = [tmp_path / f"out.{kind}" for kind in ("json", "html", "xml")]
    done = CliRunner().invoke(main, [
        "long", str(folder), "--text", str(folder / "text.txt"), "--lengths", "256,320", "--long-attention", "hyper",
        "--long-leaf", "64", "--long-heavy", "16", "--long-samples", "16", "--long-layers", "last:2", "--max-loss",
        bound, "--json", str(names[0]), "--html", str(names[1]), "--junit", str(names[2])])
    report = json.loads(names[0].read_text())
    assert done.exit_code == (code if max(row["loss"] for row in report["lengths"]) > 0 else 0), done.output
    assert [row["tokens"] for row in report["lengths"]] == [256, 320]
    assert [layer["layer"] for layer in report["lengths"][0]["layers"]] == [1, 2]
    assert all(layer["alpha"] > 0 and 0 < layer["mass"] <= 1 for layer in report["lengths"][0]["layers"])
    assert names[1].read_text().startswith("<!doctype html>")
    judged = sum(row["copy_score"] is not None for row in report["lengths"])
    assert int(ElementTree.fromstring(names[2].read_text()).get("tests")) == 2 + judged
    assert [each["layers"] for each in report["fewer"]] == [1, 2]
    assert report["fewer"][-1]["loss"] == report["lengths"][0]["loss"]
    assert names[1].read_text().count("<svg") == 4, "seconds over length, loss over layers, error over layers twice"
    assert "\u2026" not in done.output, "a number was cut off"


def test_a_copy_score_without_meaning_fails_where_a_bound_for_it_was_asked_for(folder, tmp_path) -> None:
    """A model of random weights gains nothing on a passage that it has seen: nothing is there to be kept."""
    command = ["long", str(folder), "--text", str(folder / "text.txt"), "--lengths", "256", "--long-leaf", "64",
               "--max-loss", "100", "--junit", str(tmp_path / "out.xml")]
    for extra, code, tests in (([], 0, "1"), (["--min-copy", "0.5"], 1, "2")):
        done = CliRunner().invoke(main, [*command, *extra])
        assert done.exit_code == code, done.output
        assert "0.1 nats on a repeated passage" in done.output
        assert ElementTree.parse(tmp_path / "out.xml").getroot().get("tests") == tests


def test_a_report_that_could_not_be_written_is_refused_before_the_work(folder, tmp_path) -> None:
    done = CliRunner().invoke(main, ["long", str(folder), "--text", str(folder / "text.txt"), "--json",
                                     str(tmp_path / "none" / "out.json")])
    assert (done.exit_code, "E-REPORT-FOLDER" in done.stderr) == (2, True)


@pytest.mark.parametrize("leaf", [1, 2, 5, 7, 64, 1024, 4096])
def test_the_shortest_length_that_can_be_measured_is_the_shortest(leaf) -> None:
    tokens = np.arange(20_000)
    least = shortest_length(leaf)
    sequence = Sequence.of(tokens, least, leaf, "text")
    assert min(len(sequence.loss_rows), len(sequence.first_rows), len(sequence.copy_rows)) >= 1
    with refused("E-OPTION-LENGTHS"):
        Sequence.of(tokens, least - 1, leaf, "text")


@pytest.mark.parametrize("tokens", [20, 27, 28, 300, 3583, 3584, 3585, 9000])
def test_the_longest_length_of_a_text_is_the_longest(tokens) -> None:
    longest = longest_length(tokens)
    assert len(Sequence.of(np.arange(tokens), longest, 4, "text").ids) == longest
    with refused("E-FILE-TEXT-SHORT"):
        Sequence.of(np.arange(tokens), longest + 1, 4, "text")


@pytest.mark.parametrize(("changes", "code"), [
    (["--lengths", "a"], "E-OPTION-LENGTHS"), (["--lengths", "100"], "E-OPTION-LENGTHS"),
    (["--lengths", "1024"], "E-OPTION-LENGTHS"), (["--long-heavy", "17"], "E-OPTION-LONG"),
    (["--text", "missing.txt"], "E-FILE-TEXT-UNREADABLE"), (["--long-layers", "9"], "E-OPTION-LONG")])
def test_what_cannot_be_measured_is_refused(folder, changes, code) -> None:
    done = CliRunner().invoke(main, ["long", str(folder), "--text", str(folder / "text.txt"), "--lengths", "256",
                                     "--long-attention", "hyper", "--long-leaf", "64", "--long-heavy", "16", *changes])
    assert done.exit_code == 2
    assert code in done.stderr
