"""`gqa-export trt` as a user meets it: from a checkpoint to an engine bundle, and what it does with what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import gqa_models
import pytest
from click.testing import CliRunner

from gqa_export.cli import main
from gqa_export.environment import tensorrt_libraries
from gqa_export.environment.machine import nvidia

pytestmark = pytest.mark.whole_model

NEEDS_RTX = pytest.mark.skipif(not tensorrt_libraries.is_there("rtx"),
                               reason="TensorRT for RTX is not installed: pip install 'gqa-export[rtx]'")
NEEDS_NO_GPU = pytest.mark.skipif(bool(nvidia()[1]), reason="this machine has a GPU: TensorRT could build")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny Llama checkpoint."""
    return gqa_models.write_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def ort_bundle(tiny, tmp_path_factory):
    """That checkpoint, exported for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("ort") / "bundle"
    result = CliRunner().invoke(main, ["onnx", str(tiny), "-o", str(folder), "--no-validate"])
    assert result.exit_code == 0, result.output
    return folder


def trt(*words):
    """Run the verb in this process."""
    return CliRunner().invoke(main, ["trt", *map(str, words)])


@pytest.mark.slow
@NEEDS_RTX
def test_a_checkpoint_becomes_an_engine_bundle_and_a_model_repository(tiny, tmp_path) -> None:
    out, repository = tmp_path / "small", tmp_path / "repository"
    done = subprocess.run(
        [sys.executable, "-m", "gqa_export", "trt", str(tiny), "-o", str(out), "--flavor", "rtx", "--dtype", "fp16",
         "--compute-capability", "8.9", "--capacity", "64", "--max-batch", "2", "--triton-repository", str(repository)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for text in ("engine for 8.9, float16, plugin attention, capacity 64, 3 layers", "up to 2 sequences",
                 "gqa::GroupedQueryAttention version 1, 3 layers", "nothing has run it yet", "Triton model repository"):
        assert text in done.stdout, done.stdout
    manifest = json.loads((out / "gqa_export.json").read_text())
    assert manifest["engine"]["flavor"] == "rtx"
    assert manifest["source"]["checkpoint"].endswith("llama")
    assert {path.name for path in out.iterdir()} == {*manifest["files"], "gqa_export.json"}
    served = repository / "small" / "1" / "engine" / "model.engine"
    assert served.samefile(out / "model.engine"), "no second copy of the weights"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["repository", "small"], "nothing is left behind"


def test_a_bundle_for_onnxruntime_is_refused_with_the_command_that_exports_it_again(ort_bundle, tmp_path) -> None:
    result = trt(ort_bundle, "-o", tmp_path / "engine")
    assert result.exit_code == 2
    assert "target ort cannot become an engine" in result.output
    assert "gqa-export onnx" in result.output
    assert "--target trt-plugin" in result.output
    assert not (tmp_path / "engine").exists()


@NEEDS_NO_GPU
def test_tensorrt_without_a_gpu_exits_with_3_before_any_export(tiny, tmp_path) -> None:
    result = trt(tiny, "-o", tmp_path / "engine", "--flavor", "tensorrt")
    assert result.exit_code == 3
    assert "no NVIDIA GPU" in result.output
    assert "--flavor rtx" in result.output
    assert not list(tmp_path.iterdir())


@NEEDS_RTX
@NEEDS_NO_GPU
@pytest.mark.parametrize(("words", "text"), [
    (["--compute-capability", "9.0"], "does not build for 9.0 ahead of time"),
    (["--compute-capability", "fast"], "'fast' is not a compute capability"),
    (["--capacity", "64", "--max-prompt", "65"], "do not fit a cache of 64"),
    (["--timing-cache", "no/such/folder/file"], "folder does not exist")])
def test_bad_options_are_refused_before_any_export(tiny, tmp_path, words, text) -> None:
    result = trt(tiny, "-o", tmp_path / "engine", "--flavor", "rtx", *words)
    assert result.exit_code == 2, result.output
    assert text in result.output
    assert "fix:" in result.output
    assert not list(tmp_path.iterdir())


def test_without_tensorrt_the_command_that_installs_it_is_named(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tensorrt_libraries, "find_spec", lambda name: None)
    result = trt(tiny, "-o", tmp_path / "engine", "--flavor", "rtx")
    assert result.exit_code == 2
    assert "pip install 'gqa-export[rtx]'" in result.output
    assert f"{tiny} is a checkpoint, not a bundle" in result.output
    assert f"gqa-export onnx {tiny} -o DIR --target trt-plugin" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("source", "code"), [("", "E-CKPT-NO-CONFIG"), ("nothing/here/at/all", "E-CKPT-NOT-FOUND"),
                                              ("weights", "E-CKPT-ONE-FILE")])
def test_without_tensorrt_too_a_source_that_is_neither_bundle_nor_checkpoint_is_named_first(
        tiny, tmp_path, monkeypatch, source, code) -> None:
    monkeypatch.setattr(tensorrt_libraries, "find_spec", lambda name: None)
    (tmp_path / "empty").mkdir()
    place = {"": tmp_path / "empty", "weights": tiny / "model.safetensors"}.get(source, source)
    result = trt(place, "-o", tmp_path / "engine", "--flavor", "rtx")
    assert result.exit_code == 2
    assert "not installed" not in result.output
    assert f"code: {code}" in result.output


def test_an_output_that_is_not_ours_is_not_replaced(tiny, tmp_path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "thesis.tex").write_text("mine")
    for words in ([], ["--force"]):
        result = trt(tiny, "-o", tmp_path / "engine", *words)
        assert result.exit_code == 2
        assert "choose another" in result.output
    assert (tmp_path / "engine" / "thesis.tex").read_text() == "mine"


def test_a_model_repository_that_is_taken_is_refused_first(tiny, tmp_path) -> None:
    (tmp_path / "repository" / "engine").mkdir(parents=True)
    result = trt(tiny, "-o", tmp_path / "engine", "--triton-repository", tmp_path / "repository")
    assert result.exit_code == 2
    assert "another model of that name" in result.output
    assert not (tmp_path / "engine").exists()
