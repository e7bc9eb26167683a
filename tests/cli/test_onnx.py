"""`gqa-export onnx` as a user meets it: what it says, what it writes, and what it does with what is wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys

import gqa_models
import pytest
from click.testing import CliRunner

from gqa_export.cli import main
from gqa_export.errors import NotCheckedHere

pytestmark = pytest.mark.whole_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny Llama checkpoint."""
    return gqa_models.write_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


def export(*words):
    """Run the verb in this process."""
    return CliRunner().invoke(main, ["onnx", *map(str, words)])


def refused(result, *words):
    """Exit 2, a cause and a fix, no traceback."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert "fix:" in result.output or "Error:" in result.output
    for word in words:
        assert word in result.output


def left_over(folder):
    """What lies beside the checkpoint."""
    return sorted(path.name for path in folder.iterdir())


def test_a_bundle_is_written_with_all_it_promises(tiny, tmp_path):
    out = tmp_path / "bundle"
    done = subprocess.run([sys.executable, "-m", "gqa_export", "onnx", str(tiny), "-o", str(out), "--no-validate"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "no tokenizer" in done.stdout
    manifest = json.loads((out / "gqa_export.json").read_text())
    assert set(manifest["files"]) >= {"model.onnx", "model.onnx.data", "config.json", "genai_config.json"}
    assert {path.name for path in out.iterdir()} == {*manifest["files"], "gqa_export.json"}
    assert left_over(tmp_path) == ["bundle"]


def test_an_export_is_validated_unless_told_otherwise(tiny, tmp_path):
    result = export(tiny, "-o", tmp_path / "bundle")
    assert result.exit_code == 0, result.output
    assert "passed" in result.output.lower()


def test_a_passing_export_prints_few_lines_and_the_table_only_if_wanted(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = export(tiny, "-o", tmp_path / "bundle", "--capacity", 64)
    lines = result.output.splitlines()
    assert result.exit_code == 0, result.output
    assert len(lines) <= 15, result.output
    assert not any("teacher_forced" in line for line in lines)
    assert any(line.startswith("  logits: max |difference|") for line in lines)
    assert lines[-1].startswith("PASSED")
    whole = export(tiny, "-o", tmp_path / "other", "--capacity", 64, "--verbose")
    assert "teacher_forced" in whole.output
    assert "refusal (5)" in whole.output


def test_a_fallback_of_every_layer_is_one_line(tmp_path):
    checkpoint = gqa_models.write_tiny("llama", tmp_path / "checkpoint", head_dim=20)
    result = export(checkpoint, "-o", tmp_path / "bundle", "--capacity", 64, "--no-validate")
    found = [line for line in result.output.splitlines() if line.startswith("  fallback: ")]
    reasons = {line.split(": ", 2)[2] for line in found}
    assert len(found) == len(reasons) > 0
    assert "layers 0-2" in found[0]


def test_bf16_on_a_cpu_is_compared_as_its_fp32_twin_and_that_is_said(tmp_path):
    checkpoint = gqa_models.write_tiny("llama", tmp_path / "checkpoint", dtype="bfloat16")
    result = export(checkpoint, "-o", tmp_path / "bundle", "--provider", "cpu")
    assert result.exit_code == 0, result.output
    assert "fp32 twin" in result.output
    assert "passed" in result.output.lower()


def test_an_export_of_which_nothing_can_be_compared_here_is_no_success(tiny, tmp_path, monkeypatch):
    def unable(*_args, **_options):
        raise NotCheckedHere("the comparison needs 900 GB of memory, 1 is free", "there", "use a larger machine")

    monkeypatch.setattr("gqa_export.validation.validate.validate", unable)
    for dtype in ("fp32", "fp16"):
        result = export(tiny, "-o", tmp_path / dtype, "--dtype", dtype)
        assert result.exit_code == 3, result.output
        assert "900 GB" in result.output
        assert (tmp_path / dtype / "gqa_export.json").is_file()


def test_a_non_empty_output_is_refused_and_force_replaces_bundles_only(tiny, tmp_path):
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    refused(export(tiny, "-o", out), "not empty")
    refused(export(tiny, "-o", out, "--force"), "something else")
    assert left_over(out) == ["precious.txt"]
    shutil.rmtree(out)
    assert export(tiny, "-o", out, "--no-validate").exit_code == 0
    assert export(tiny, "-o", out, "--no-validate", "--force", "--target", "portable").exit_code == 0
    assert json.loads((out / "gqa_export.json").read_text())["target"] == "portable"
    assert left_over(tmp_path) == ["bundle"]


@pytest.mark.parametrize(("words", "said"), [
    (["--capacity", "100000"], "capacity 100000"), (["--capacity", "0"], "--capacity"),
    (["--target", "tflite"], "--target"), (["--weights", "inplace"], "inplace")])
def test_options_that_make_no_sense_are_refused_before_anything_is_written(tiny, tmp_path, words, said):
    refused(export(tiny, "-o", tmp_path / "bundle", *words), said)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("name", ["gemma3_bidirectional", "t5"])
def test_models_that_cannot_be_held_are_refused_and_nothing_is_left(tmp_path, name):
    checkpoint = gqa_models.write_tiny(name, tmp_path / "checkpoint")
    refused(export(checkpoint, "-o", tmp_path / "bundle"))
    assert left_over(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("damage", ["truncated", "missing tensor", "no weights", "garbage header"])
def test_damaged_weights_are_refused_and_nothing_is_left(tiny, tmp_path, damage):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny, checkpoint)
    file = checkpoint / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "no weights":
        file.unlink()
    elif damage == "garbage header":
        file.write_bytes(b"\xff" * 64)
    else:
        from safetensors.numpy import load_file, save_file

        tensors = load_file(file)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
    refused(export(checkpoint, "-o", tmp_path / "bundle"))
    assert left_over(tmp_path) == ["checkpoint"]


def test_a_full_disk_is_reported_and_leaves_nothing(tiny, tmp_path, monkeypatch):
    from gqa_export.bundle import writer

    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer.HashingFile, "write", full)
    refused(export(tiny, "-o", tmp_path / "bundle"), "disk is full")
    assert left_over(tmp_path) == []


def test_an_interrupt_leaves_the_old_bundle(tiny, tmp_path, monkeypatch):
    from gqa_export.bundle import writer

    out = tmp_path / "bundle"
    assert export(tiny, "-o", out, "--no-validate").exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def interrupted(self, manifest):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer.BundleWriter, "finish", interrupted)
    assert export(tiny, "-o", out, "--no-validate", "--force").exit_code == 130
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert left_over(tmp_path) == ["bundle"]
