"""A bundle's manifest carries the verdict of the export's own comparison, and of `validate --record`, with the loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from gqa_models import write_tiny
from refusal import refused
from small_text import byte_tokenizer

import gqa_export as gqa
from gqa_export.bundle.manifest import MANIFEST, Manifest, read_manifest
from gqa_export.cli import main
from gqa_export.errors import GqaExportError, InvalidBundle


def ran(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a checkpoint, a bundle of it as the command leaves it)"""
    folder = tmp_path_factory.mktemp("recorded")
    checkpoint = write_tiny("llama", folder / "checkpoint", num_hidden_layers=1)
    byte_tokenizer(checkpoint)
    done = ran("onnx", checkpoint, "-o", folder / "b", "--quantize", "int4", "--capacity", 64)
    assert done.exit_code == 0, done.output
    return checkpoint, folder / "b"


def test_an_export_records_what_its_own_comparison_found(made: tuple[Path, Path]) -> None:
    found = read_manifest(made[1]).verdict
    assert found is not None
    assert (found.passed, found.export_exact, found.as_shipped, found.loss) == (True, True, True, None)
    assert (found.level, found.activations, found.dtype) == ("quick", "int8", "float32")
    assert found.cases > 8
    shown = ran("inspect", made[1]).output
    assert "verdict recorded: PASSED in float32, level quick" in shown
    assert "export exact passed; as shipped passed; loss: not measured" in shown


def test_validate_records_the_loss_where_it_is_told_to(made: tuple[Path, Path]) -> None:
    checkpoint, bundle = made
    before = (bundle / MANIFEST).read_bytes()
    text = bundle.parent / "text.txt"
    text.write_text("words that are read, and read again. " * 12)
    words = ("validate", bundle, "--against", checkpoint, "--reference", checkpoint, "--text", text, "--steps", 1)
    assert ran(*words).exit_code == 0
    assert (bundle / MANIFEST).read_bytes() == before
    assert ran(*words, "--record", "--max-kl", 0).exit_code == 1
    found = read_manifest(bundle).verdict
    assert found is not None
    assert found.loss is not None
    assert not found.passed
    assert found.export_exact
    assert found.loss.kl_mean > 0
    assert found.loss.text == "text.txt"
    assert ran("validate", bundle, "--against", checkpoint, "--steps", 1).exit_code == 0  # the files are the same
    assert "DIFFERENT in float32, level quick" in ran("inspect", bundle).output


def test_nothing_is_recorded_without_a_comparison(made: tuple[Path, Path], tmp_path: Path) -> None:
    assert ran("onnx", made[0], "-o", tmp_path / "b", "--capacity", 64, "--no-validate").exit_code == 0
    assert "verdict" not in json.loads((tmp_path / "b" / MANIFEST).read_text())
    refusal = ran("validate", tmp_path / "b", made[1], "--record")
    assert refusal.exit_code == 2
    assert "--against CHECKPOINT" in refusal.output


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_loss_of_logits_that_are_nan_is_a_failure_without_numbers(made: tuple[Path, Path], tmp_path: Path) -> None:
    bundle = gqa.export(made[0], tmp_path / "b", capacity=64)
    verdict = bundle.validate(made[0], steps=1, reference=made[0])
    assert verdict.loss is not None
    lost = replace(verdict, loss=replace(verdict.loss, kl_mean=np.nan))
    found = bundle.record(lost).manifest.verdict
    assert found is not None
    assert (found.passed, found.loss) == (False, None)
    assert read_manifest(tmp_path / "b").verdict == found


@pytest.mark.parametrize(("field", "value"), [("passed", "yes"), ("cases", -1), ("loss", {"kl_mean": 0.0}),
                                              ("level", "a\u0007b"), ("unknown", 1)])
def test_a_record_that_is_none_is_refused(made: tuple[Path, Path], field: str, value: object) -> None:
    data = json.loads((made[1] / MANIFEST).read_text())
    data["verdict"][field] = value
    with refused("E-BUNDLE-MANIFEST", InvalidBundle):
        Manifest.from_json(json.dumps(data))


def test_a_folder_that_cannot_be_written_is_named(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = gqa.open_bundle(made[1])
    verdict = bundle.validate(made[0], steps=1)

    def move(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("gqa_export.bundle.record_verdict.move", move)
    with refused("E-FILE-RECORD", GqaExportError):
        bundle.record(verdict)
    assert {path.name for path in made[1].iterdir()} == {*bundle.manifest.files, MANIFEST}
