"""What cannot be trained is said before training, and nothing is left at the output."""

from __future__ import annotations

import errno
import sys
import types

import pytest
from click.testing import CliRunner

from gqa_export import cli
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.errors import GqaExportError
from gqa_export.uptraining.options import UptrainOptions
from gqa_export.uptraining.uptrain import uptrain


def refused(student, tmp_path, text, **options) -> GqaExportError:
    output = tmp_path / "parent" / "out"
    with pytest.raises(GqaExportError) as caught:
        uptrain(open_checkpoint(student), output, UptrainOptions(
            **{"text": str(text), "length": 32, "batch": 4, "steps": 2, **options}))
    assert not output.exists()
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize(("content", "says"), [(None, "cannot read the text"), (b"", "empty"),
                                               (b"\xff\xfe", "not UTF-8"), (b"too short", "fewer than one row of 32")])
def test_texts_that_cannot_be_trained_on(content, says, student, tmp_path):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert says in refused(student, tmp_path, path).what


@pytest.mark.parametrize(("options", "says"), [
    ({"fraction": 0.1}, "both say how long"), ({"steps": 0, "fraction": 0.1}, "original pre-training"),
    ({"steps": 0, "pretraining_steps": 10}, "original pre-training"), ({"length": 4096}, "longer than the model's"),
])
def test_options_that_contradict(options, says, student, tmp_path, book):
    assert says in refused(student, tmp_path, book, **options).what


def test_a_teacher_of_another_vocabulary(student, tmp_path, book):
    import gqa_models

    teacher = gqa_models.write_tiny("llama", tmp_path / "teacher", vocab_size=300)
    assert "vocabulary of 300" in refused(student, tmp_path, book, teacher=str(teacher)).what


def test_a_tokenizer_of_another_model(tmp_path, book):
    import gqa_models
    from small_text import byte_tokenizer

    folder = gqa_models.write_tiny("llama", tmp_path / "small", vocab_size=40)
    byte_tokenizer(folder)
    assert "the model knows 40" in refused(folder, tmp_path, book).what


def test_no_tokenizer(tmp_path, book):
    import gqa_models

    folder = gqa_models.write_tiny("llama", tmp_path / "bare")
    assert "no tokenizer" in refused(folder, tmp_path, book).what


def test_a_run_that_diverges_ends(student, tmp_path, book):
    error = refused(student, tmp_path, book, steps=12, learning_rate=1e30, warmup=0.0, weight_decay=0.0)
    assert "training diverged" in error.what


def test_gguf(tmp_path, book):
    from gqa_export.checkpoint.checkpoint import Checkpoint

    with pytest.raises(GqaExportError, match="GGUF"):
        uptrain(Checkpoint("m.gguf", tmp_path, "gguf", tmp_path / "m.gguf", {}), tmp_path / "out",
                UptrainOptions(text=str(book)))


def test_a_full_disk_leaves_no_output_and_what_was_trained(student, tmp_path, book, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "no")

    monkeypatch.setattr("gqa_export.uptraining.uptrain.shutil.copyfile", full)
    error = refused(student, tmp_path, book)
    assert error.what.startswith("the disk is full")
    assert [path.name for path in (tmp_path / "parent").iterdir()] == [".out.uptrain"]


def test_a_data_set_needs_its_package(student, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = CliRunner().invoke(cli.main, ["uptrain", str(student), "-o", str(tmp_path / "out"), "--text", "hub:a/b"])
    assert result.exit_code == 2
    assert "gqa-export[uptrain]" in result.stderr


def test_documents_of_a_data_set_are_joined_by_the_end_token(student, monkeypatch):
    from gqa_export.uptraining.rows import tokens_of

    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return [{"text": "ab"}, {"text": "c"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    tokenizer = type("T", (), {"eos_token_id": 7, "__call__": lambda self, text, **_: {
        "input_ids": [ord(letter) for letter in text]}})()
    assert tokens_of("hub:org/name:en:validation", tokenizer).tolist() == [97, 98, 7, 99]
    assert asked == [("org/name", "en", "validation", True)]
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: [{"body": ""}]))
    with pytest.raises(GqaExportError, match="cannot be read: KeyError"):
        tokens_of("hub:org/name", tokenizer)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: []))
    with pytest.raises(GqaExportError, match="no documents"):
        tokens_of("hub:org/name", tokenizer)
