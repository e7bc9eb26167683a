"""Uptraining: the curve goes down, a killed run goes on as if nothing had been, a teacher is listened to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from refusal import refused
from safetensors.torch import load_file

from gqa_export.checkpoint.content import model_digest
from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.uptraining.curve import Point, picture, split_log
from gqa_export.uptraining.options import UptrainOptions, steps_of
from gqa_export.uptraining.trainer import divergence, last_checkpoint
from gqa_export.uptraining.uptrain import uptrain
from gqa_export.uptraining.work import claimed, on_first_rank, open_work, settings_of, work_folder

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


def begun(student, output, book, **more):
    """The work folder of a run that was killed before its first step."""
    open_work(work_folder(output), settings_of(open_checkpoint(student), options(book, **more), 1), restart=False)


def test_an_unfinished_run_with_other_settings_is_not_mixed(student, book, tmp_path):
    begun(student, tmp_path / "out", book, steps=9)
    with refused("E-UPTRAIN-OTHER-SETTINGS") as refusal:
        train(student, tmp_path / "out", book)
    assert "(different: steps)" in refusal.error.what
    result = uptrain(open_checkpoint(student), tmp_path / "out", options(book, steps=2), restart=True)
    assert result.steps == 2


def edit_text(folder, book):
    book.write_text(book.read_text() + "One sentence more. ")
    return "text"


def edit_weights(folder, book):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x3c")
    return "checkpoint"


def edit_config(folder, book):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    return "checkpoint"


def edit_tokenizer(folder, book):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "truncation": None, "padding": None}, indent=3))
    return "tokenizer"


@pytest.mark.parametrize("edit", [edit_text, edit_weights, edit_config, edit_tokenizer])
def test_a_run_is_told_by_what_its_files_hold_not_by_their_names(student, book, tmp_path, edit):
    """Edited beneath the same path, a run is another one; moved or copied, it is the same and goes on."""
    folder, copy = tmp_path / "student", tmp_path / "book.txt"
    shutil.copytree(student, folder)
    shutil.copy(book, copy)
    begun(student, tmp_path / "out", book, steps=1)
    same = settings_of(open_checkpoint(folder), options(copy, steps=1), 1)
    open_work(work_folder(tmp_path / "out"), same, restart=False)
    changed = edit(folder, copy)
    with refused("E-UPTRAIN-OTHER-SETTINGS") as refusal:
        train(folder, tmp_path / "out", copy, steps=1)
    assert f"(different: {changed})" in refusal.error.what


def test_another_teacher_or_another_number_of_processes_is_another_run(student, book, tmp_path):
    import gqa_models

    teacher = gqa_models.write_tiny("llama", tmp_path / "teacher", seed=5, num_hidden_layers=2)
    taught = options(book, teacher=str(teacher))
    before = settings_of(open_checkpoint(student), taught, 1)
    gqa_models.write_tiny("llama", tmp_path / "teacher2", seed=6, num_hidden_layers=2)
    shutil.copy(tmp_path / "teacher2" / "model.safetensors", teacher / "model.safetensors")
    after = settings_of(open_checkpoint(student), taught, 2)
    assert {name for name in before if before[name] != after[name]} == {"teacher", "processes"}


def test_the_same_weights_in_shards_are_the_same_checkpoint(student, tmp_path):
    from safetensors.torch import save_file

    tensors = load_file(student / "model.safetensors")
    folder = tmp_path / "shards"
    shutil.copytree(student, folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:3]}, folder / "a.safetensors")
    save_file({name: tensors[name] for name in names[3:]}, folder / "b.safetensors")
    weight_map = {name: "a.safetensors" if name in names[:3] else "b.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert model_digest(open_checkpoint(folder)) == model_digest(open_checkpoint(student))


@pytest.mark.parametrize("content", ["", "[]", "{", "\udcff"], ids=range(4))
def test_settings_that_cannot_be_read_are_those_of_another_run(student, book, tmp_path, content):
    work = work_folder(tmp_path / "out")
    work.mkdir()
    (work / "settings.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with refused("E-UPTRAIN-OTHER-SETTINGS"):
        train(student, tmp_path / "out", book)


HOLDER = """
import sys
from pathlib import Path
from gqa_export.uptraining.work import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_runs_cannot_fill_one_folder_and_a_killed_one_does_not_block(student, book, tmp_path):
    work = work_folder(tmp_path / "out")
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(work)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as other:
        assert other.stdout.readline() == "held\n"
        with refused("E-UPTRAIN-RUNNING"):
            uptrain(open_checkpoint(student), tmp_path / "out", options(book, steps=1), restart=True)
        other.kill()
    assert uptrain(open_checkpoint(student), tmp_path / "out", options(book, steps=1)).steps == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_the_first_rank_touches_the_work_folder(tmp_path, monkeypatch):
    """The others wait for it and go on, or end with its error."""
    import accelerate.utils

    sent = []

    def broadcast(objects):
        objects[:] = sent or objects
        sent[:] = objects

    monkeypatch.setattr(accelerate.utils, "broadcast_object_list", broadcast)
    on_first_rank(0, 2, (tmp_path / "made").mkdir)
    on_first_rank(1, 2, lambda: pytest.fail("another rank ran it"))
    assert (tmp_path / "made").is_dir()
    sent.clear()
    with claimed(tmp_path / "work"):
        for rank in (0, 1):
            with refused("E-UPTRAIN-RUNNING"):
                on_first_rank(rank, 2, claimed(tmp_path / "work").__enter__)


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
