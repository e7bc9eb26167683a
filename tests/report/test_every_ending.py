"""A run of `validate` that ends in anything but a verdict replaces the reports of the run before."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner
from refusal import refused

from gqa_export.cli import main
from gqa_export.errors import InvalidBundle, InvalidCheckpoint
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.validation.validate import validate

from .schema import misfit

DAMAGED = ["", "{", "{}", '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}']


@pytest.mark.parametrize(("ending", "code", "name"), [
    (ZeroDivisionError("of a library"), 70, "E-REPORT-BUG"), (KeyboardInterrupt(), 70, "E-REPORT-INTERRUPTED"),
    (MemoryError(), 2, "E-ENV-MEMORY"), (BaseException("a panic"), 70, "E-REPORT-BUG")], ids=lambda value: str(value))
def test_any_exception_replaces_yesterdays_pass(ending, code, name, tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        raise ending

    monkeypatch.setattr("gqa_export.api.open_bundle", fail)
    monkeypatch.setattr("gqa_export.cli.validate.say_what_was_checked", lambda bundle: None)
    report, junit = tmp_path / "verdict.json", tmp_path / "verdict.xml"
    report.write_text('{"passed": true}')
    junit.write_text("<testsuites/>")
    arguments = ["validate", str(tmp_path), "--against", "x", "--json", str(report), "--junit", str(junit)]
    with suppress(type(ending)):
        assert CliRunner().invoke(main, arguments).exit_code != 0
    data = json.loads(report.read_text())
    assert misfit(data, unknown_keys=False) == ""
    assert (data["passed"], data["exit_code"], data["error"]["code"]) == (False, code, name)
    assert 'errors="1"' in junit.read_text()


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_tokenizer_is_refused_before_the_work(content, bundle, checkpoint, tmp_path, monkeypatch):
    def work(*_arguments, **_options):
        raise AssertionError("the work has begun")

    monkeypatch.setattr("gqa_export.validation.validate.open_reference", work)
    monkeypatch.setattr("gqa_export.exporting.prepare.traced_model", work)
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (folder / "tokenizer.json").write_text(content)
    with refused("E-BUNDLE-TOKENIZER", InvalidBundle):
        validate(folder, checkpoint)
    source = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    (source / "tokenizer.json").write_text(content)
    with refused("E-CKPT-TOKENIZER", InvalidCheckpoint):
        export_onnx(source, tmp_path / "never", ExportOptions(capacity=128))
