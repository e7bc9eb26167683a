"""Uptraining: the curve goes down, a killed run goes on as if nothing had been, a teacher is listened to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from refusal import refused
from safetensors.torch import load_file

from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.uptraining.curve import Point, picture, split_log
from gqa_export.uptraining.options import UptrainOptions, steps_of
from gqa_export.uptraining.trainer import divergence, last_checkpoint
from gqa_export.uptraining.uptrain import uptrain, work_folder

pytestmark = pytest.mark.whole_model


def options(book, **more) -> UptrainOptions:
    return UptrainOptions(**{"text": str(book), "steps": 8, "length": 32, "batch": 4, "learning_rate": 1e-3,
                             "eval_rows": 8, **more})


def train(student, output, book, **more):
    return uptrain(open_checkpoint(student), output, options(book, **more))


@pytest.fixture(scope="module")
def plain(student, book, tmp_path_factory):
    """(folder, result) of an uninterrupted run."""
    output = tmp_path_factory.mktemp("plain") / "out"
    return output, train(student, output, book, steps=24, save_steps=4)


def test_perplexity_falls_and_the_result_is_an_ordinary_checkpoint(plain, student):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, result = plain
    assert result.perplexity_after < 0.5 * result.perplexity_before
    assert [point.step for point in result.train] == list(range(1, 25))
    assert (result.held_out[0].step, result.held_out[-1].step) == (0, 24)
    assert len(result.held_out) > 5
    assert {tensor.dtype for tensor in open_checkpoint(folder).tensors.values()} == {"bfloat16"}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_key_value_heads == 2
    assert model.config.use_cache
    assert AutoTokenizer.from_pretrained(folder)("king")["input_ids"]
    assert not work_folder(folder).exists()
    report = json.loads((folder / "gqa_uptrain.json").read_text())
    assert report["perplexity_after"] == result.perplexity_after
    assert "held out" in (folder / "gqa_uptrain.svg").read_text()


def test_reported_perplexity_is_that_of_the_model(plain, book):
    """The same rows through transformers directly; the file's bf16 weights move it by far less than a percent."""
    from gqa_export.checkpoint.tokenized_text import load_tokenizer, tokenize

    folder, result = plain
    ids = tokenize(load_tokenizer(folder), book.read_text())
    held = ids[int(len(ids) * 0.9):]
    rows = held[: len(held) // 32 * 32].reshape(-1, 32)
    rows = torch.from_numpy(rows[np.linspace(0, len(rows) - 1, 8).round().astype(int)].astype("int64"))
    model = load_model(open_checkpoint(folder), "fp32")
    with torch.no_grad():
        loss = model(input_ids=rows, labels=rows).loss
    assert float(loss.exp()) == pytest.approx(result.perplexity_after, rel=0.01)


def test_a_killed_run_goes_on_with_the_same_curve_and_the_same_weights(plain, student, book, tmp_path):
    """SIGKILL after the second checkpoint; equal to the last bit, since order, optimizer and schedule are restored."""
    folder, expected = plain
    output = tmp_path / "out"
    command = [sys.executable, "-m", "gqa_export", "uptrain", str(student), "-o", str(output), "--text", str(book),
               "--steps", "24", "--length", "32", "--batch", "4", "--learning-rate", "1e-3", "--eval-rows", "8",
               "--save-steps", "4"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work, deadline = work_folder(output), time.monotonic() + 120
    while (last_checkpoint(work) is None or last_checkpoint(work).name == "checkpoint-4") and child.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not output.exists()
    (work / "checkpoint-999").mkdir()  # one whose writing was cut off
    result = train(student, output, book, steps=24, save_steps=4)
    assert result.resumed_at is not None
    assert 8 <= result.resumed_at < 24
    assert result.train == expected.train
    assert result.held_out == expected.held_out
    before, after = (load_file(place / "model.safetensors") for place in (folder, output))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_unfinished_run_with_other_settings_is_not_mixed(student, book, tmp_path):
    work = work_folder(tmp_path / "out")
    work.mkdir()
    (work / "settings.json").write_text(json.dumps({"checkpoint": str(student.resolve()),
                                                    **json.loads(options(book, steps=9).settings())}, indent=1))
    with refused("E-UPTRAIN-OTHER-SETTINGS") as refusal:
        train(student, tmp_path / "out", book)
    assert "(different: steps)" in refusal.error.what
    result = uptrain(open_checkpoint(student), tmp_path / "out", options(book, steps=2), restart=True)
    assert result.steps == 2


def test_accumulated_batches_give_the_curve_of_one_large_batch(student, book, tmp_path):
    """The same sums in another order: fp32 rounding, grown over four steps of AdamW."""
    whole = train(student, tmp_path / "whole", book, steps=4, batch=4)
    parts = train(student, tmp_path / "parts", book, steps=4, batch=2, accumulate=2)
    assert [p.loss for p in parts.train] == pytest.approx([p.loss for p in whole.train], rel=1e-3)
    assert parts.tokens == whole.tokens == 4 * 4 * 32


def test_gradient_checkpointing_changes_nothing_and_bf16_little(student, book, tmp_path):
    plain = train(student, tmp_path / "plain", book, steps=4)
    saved = train(student, tmp_path / "saved", book, steps=4, gradient_checkpointing=True)
    mixed = train(student, tmp_path / "mixed", book, steps=4, bf16=True)
    assert saved.train == plain.train
    assert mixed.train != plain.train
    assert [p.loss for p in mixed.train] == pytest.approx([p.loss for p in plain.train], rel=0.02)


def test_a_teacher_that_is_the_student_has_nothing_to_teach(student, book, tmp_path):
    result = train(student, tmp_path / "out", book, steps=2, teacher=str(student), distill_weight=1.0)
    assert abs(result.train[0].loss) < 1e-6


def test_distillation_is_the_weighted_sum_of_both_losses(student, book, tmp_path):
    import gqa_models

    teacher = gqa_models.write_tiny("llama", tmp_path / "teacher", seed=5, num_hidden_layers=2)
    first = {weight: train(student, tmp_path / f"out{weight}", book, steps=1, teacher=str(teacher), temperature=2.0,
                           distill_weight=weight).train[0].loss for weight in (0.0, 0.25, 1.0)}
    assert first[0.25] == pytest.approx(0.75 * first[0.0] + 0.25 * first[1.0], rel=1e-5)


def test_divergence_is_kullback_and_leiblers():
    student, teacher = torch.randn(2, 3, 11), torch.randn(2, 3, 11)
    ours, theirs = (torch.softmax(x.double() / 2, dim=-1) for x in (student, teacher))
    expected = (theirs * (theirs / ours).log()).sum()
    assert float(divergence(student, teacher, 2.0)) == pytest.approx(float(expected), rel=1e-5)
    assert float(divergence(student, student, 1.0)) == 0.0


def test_rows_are_the_text_and_nothing_else(student, book, tmp_path):
    from gqa_export.checkpoint.tokenized_text import load_tokenizer
    from gqa_export.uptraining.rows import EVAL, TRAIN, prepare

    prepare(student, tmp_path, options(book), 320)
    train_rows, held = np.load(tmp_path / TRAIN), np.load(tmp_path / EVAL)
    decoded = load_tokenizer(student).decode(train_rows.reshape(-1).tolist())
    assert book.read_text().startswith(decoded)
    text = book.read_text()
    assert load_tokenizer(student).decode(held.reshape(-1).tolist()) in text[int(len(text) * 0.89):]


def test_steps_are_given_or_a_fraction_or_one_pass(book):
    assert steps_of(options(book, steps=7), 100) == 7
    assert steps_of(options(book, steps=0, fraction=0.05, pretraining_steps=1000), 100) == 50
    assert steps_of(options(book, steps=0, batch=4, accumulate=2), 100) == 12
    assert steps_of(options(book, steps=0, batch=4), 100, processes=5) == 5


def test_the_last_entry_of_a_step_counts_in_the_curve():
    train_points, held = split_log([{"step": 1, "loss": 3.0}, {"step": 1, "eval_loss": 4.0}, {"step": 1, "loss": 2.0},
                                    {"step": 2, "train_runtime": 1.0}])
    assert train_points == [Point(1, 2.0)]
    assert held == [Point(1, 4.0)]
    drawn = picture("a < b", {"one": held, "two": [Point(1, 9.0), Point(5, 1.0)]}, ("level", 20.0))
    assert "a &lt; b" in drawn
    assert drawn.count("<polyline") == 3
