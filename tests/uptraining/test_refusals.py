"""What cannot be trained is refused before training, and nothing is left at the output."""

from __future__ import annotations

import errno
import sys
import types

import pytest
from click.testing import CliRunner
from refusal import refused

from gqa_export import cli
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.errors import GqaExportError, InvalidCheckpoint
from gqa_export.uptraining.options import UptrainOptions
from gqa_export.uptraining.uptrain import uptrain


def run(student, tmp_path, text, **options):
    uptrain(open_checkpoint(student), tmp_path / "parent" / "out", UptrainOptions(
        **{"text": str(text), "length": 32, "batch": 4, "steps": 2, **options}))


def refusal_of(student, tmp_path, text, code, kind=GqaExportError, **options) -> GqaExportError:
    with refused(code, kind) as refusal:
        run(student, tmp_path, text, **options)
    assert not (tmp_path / "parent" / "out").exists()
    assert refusal.error.fix
    return refusal.error


@pytest.mark.parametrize(("content", "cause"), [(None, "UNREADABLE"), (b"", "EMPTY"), (b"\xff\xfe", "ENCODING"),
                                                (b"too short", "SHORT")])
def test_texts_that_cannot_be_trained_on(content, cause, student, tmp_path):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    refusal_of(student, tmp_path, path, f"E-FILE-TEXT-{cause}")


@pytest.mark.parametrize(("options", "cause"), [
    ({"fraction": 0.1}, "STEPS-TWICE"), ({"steps": 0, "fraction": 0.1}, "FRACTION"),
    ({"steps": 0, "pretraining_steps": 10}, "FRACTION"), ({"length": 4096}, "LENGTH"),
])
def test_options_that_contradict(options, cause, student, tmp_path, book):
    refusal_of(student, tmp_path, book, f"E-UPTRAIN-{cause}", **options)


def test_a_teacher_of_another_vocabulary(student, tmp_path, book):
    import gqa_models

    teacher = gqa_models.write_tiny("llama", tmp_path / "teacher", vocab_size=300)
    assert "300" in refusal_of(student, tmp_path, book, "E-UPTRAIN-TEACHER", teacher=str(teacher)).what


def test_a_tokenizer_of_another_model(tmp_path, book):
    import gqa_models
    from small_text import byte_tokenizer

    folder = gqa_models.write_tiny("llama", tmp_path / "small", vocab_size=40)
    byte_tokenizer(folder)
    assert "40" in refusal_of(folder, tmp_path, book, "E-UPTRAIN-TOKENIZER", InvalidCheckpoint).what


def test_no_tokenizer(tmp_path, book):
    import gqa_models

    folder = gqa_models.write_tiny("llama", tmp_path / "bare")
    refusal_of(folder, tmp_path, book, "E-CKPT-TOKENIZER", InvalidCheckpoint)


def test_a_run_that_diverges_ends(student, tmp_path, book):
    refusal_of(student, tmp_path, book, "E-UPTRAIN-DIVERGED", steps=12, learning_rate=1e30, warmup=0.0,
               weight_decay=0.0)


def test_gguf(tmp_path, book):
    from gqa_export.checkpoint.checkpoint import Checkpoint

    with refused("E-UPTRAIN-GGUF"):
        uptrain(Checkpoint("m.gguf", tmp_path, "gguf", tmp_path / "m.gguf", {}), tmp_path / "out",
                UptrainOptions(text=str(book)))


def test_a_full_disk_leaves_no_output_and_what_was_trained(student, tmp_path, book, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "no")

    monkeypatch.setattr("gqa_export.uptraining.uptrain.shutil.copyfile", full)
    with pytest.raises(GqaExportError) as refusal:
        run(student, tmp_path, book)
    assert refusal.value.__cause__.errno == errno.ENOSPC
    assert [path.name for path in (tmp_path / "parent").iterdir()] == [".out.uptrain"]


def test_a_data_set_needs_its_package(student, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = CliRunner().invoke(cli.main, ["uptrain", str(student), "-o", str(tmp_path / "out"), "--text", "hub:a/b"])
    assert result.exit_code == 2
    assert "gqa-export[uptrain]" in result.stderr


def test_documents_of_a_data_set_are_joined_by_the_end_token(student, monkeypatch):
    from gqa_export.uptraining.rows import tokens_of

    calls = []

    def load_dataset(name, config, split, streaming):
        calls.append((name, config, split, streaming))
        return [{"text": "ab"}, {"text": "c"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    tokenizer = type("T", (), {"eos_token_id": 7, "__call__": lambda self, text, **_: {
        "input_ids": [ord(letter) for letter in text]}})()
    assert tokens_of("hub:org/name:en:validation", tokenizer).tolist() == [97, 98, 7, 99]
    assert calls == [("org/name", "en", "validation", True)]
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: [{"body": ""}]))
    with refused("E-UPTRAIN-DATA-SET") as refusal:
        tokens_of("hub:org/name", tokenizer)
    assert "KeyError" in refusal.error.what
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: []))
    with refused("E-UPTRAIN-DATA-EMPTY"):
        tokens_of("hub:org/name", tokenizer)
