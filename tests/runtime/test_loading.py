"""Opening a bundle: providers, damaged folders, graphs that are not what the manifest says."""

from __future__ import annotations

import json
import sys

import pytest
from refusal import refused

from gqa_export.bundle.manifest import read_manifest
from gqa_export.errors import GqaExportError, NotCheckedHere
from gqa_export.runtime.ort.loading import choose_provider
from gqa_export.runtime.ort.session import OrtSession

ALL = {"cpu": ("float32", "float16"), "cuda": ("float16", "bfloat16")}


def test_bf16_on_the_cpu_cannot_be_checked_here_and_says_how(copied, edit_manifest) -> None:
    stated = json.loads((copied / "gqa_export.json").read_text())
    ports = {side: [{**fact, "dtype": fact["dtype"].replace("float32", "bfloat16")} for fact in stated[side]]
             for side in ("inputs", "outputs")}
    folder = edit_manifest(dtype="bfloat16", **ports)
    with refused("E-ENV-KERNELS", NotCheckedHere) as refusal:
        OrtSession.load(folder, "cpu")
    assert refusal.error.exit_code == 3
    assert "--dtype fp32" in refusal.error.fix


@pytest.mark.parametrize(("wanted", "dtype", "here", "chosen"), [
    ("auto", "float32", ["CUDAExecutionProvider", "CPUExecutionProvider"], "cpu"),
    ("auto", "float16", ["CUDAExecutionProvider", "CPUExecutionProvider"], "cuda"),
    ("auto", "float16", ["CPUExecutionProvider"], "cpu"),
    ("cuda", "fp16", ["CUDAExecutionProvider", "CPUExecutionProvider"], "cuda"),
    ("cpu", "fp32", ["CUDAExecutionProvider", "CPUExecutionProvider"], "cpu"),
])
def test_auto_takes_cuda_where_it_is_there_and_has_kernels(monkeypatch, wanted, dtype, here, chosen) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: here)
    assert choose_provider(wanted, dtype, ALL) == chosen


def test_cuda_without_its_provider_cannot_be_checked_here(monkeypatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with refused("E-ENV-PROVIDER", NotCheckedHere) as refusal:
        choose_provider("cuda", "float16", ALL)
    assert "gqa-export[gpu]" in refusal.error.fix


def test_an_unknown_provider_is_bad_input() -> None:
    with refused("E-OPTION-PROVIDER") as refusal:
        choose_provider("tpu", "float32", ALL)
    assert refusal.error.exit_code == 2


def test_without_onnxruntime_the_extra_is_named(monkeypatch, bundle) -> None:
    folder = bundle()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with refused("E-ENV-ONNXRUNTIME", NotCheckedHere) as refusal:
        OrtSession.load(folder)
    assert "gqa-export[ort]" in refusal.error.fix


def test_weights_that_are_gone_or_cut_short_are_refused(copied) -> None:
    data = copied / "model.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-16])
    with refused("E-BUNDLE-FILE-SIZE"):
        OrtSession.load(copied)
    data.unlink()
    with refused("E-BUNDLE-FILE"):
        OrtSession.load(copied)


def test_a_graph_that_onnxruntime_cannot_read_is_refused(copied) -> None:
    graph = copied / "model.onnx"
    graph.write_bytes(b"\xff" * graph.stat().st_size)
    with refused("E-BUNDLE-HASH") as refusal:
        OrtSession.load(copied)
    assert "model.onnx" in refusal.error.where


@pytest.mark.parametrize(("change", "message"), [
    (lambda facts: facts[:-1], "inputs lack past_key_values.1.value"),
    (lambda facts: [*facts, {"name": "more", "dtype": "float32", "shape": [1]}], "more is missing"),
    (lambda facts: [{**facts[0], "dtype": "int32"}, *facts[1:]], "input_ids is int64, stated int32"),
    (lambda facts: [*facts[:-1], {**facts[-1], "shape": ["batch", 2, "past_sequence", 8]}], "its layer needs"),
    (lambda facts: [{**facts[0], "shape": ["batch", 4]}, *facts[1:]], "stated"),
    (lambda facts: [{**facts[0], "shape": ["batch"]}, *facts[1:]], "stated"),
])
@pytest.mark.parametrize("injected", [False, True])
def test_a_graph_that_is_not_the_manifests_is_refused(copied, edit_manifest, change, message, injected) -> None:
    from dataclasses import asdict

    facts = [asdict(fact) for fact in read_manifest(copied).inputs]
    edit_manifest(inputs=change(facts))
    with pytest.raises(GqaExportError, match=message) as refusal:
        OrtSession.load(copied, infer=(lambda feed: {}) if injected else None)
    # by the graph, or already by a rule of the manifest
    assert refusal.value.code == "E-BUNDLE-INTERFACE" or "gqa_export.json" in refusal.value.where


def test_a_bundle_for_tensorrt_does_not_run_in_onnxruntime(edit_manifest) -> None:
    with refused("E-RUN-TARGET") as refusal:
        OrtSession.load(edit_manifest(target="trt-plugin"))
    assert "--target ort" in refusal.error.fix


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path) -> None:
    with refused("E-BUNDLE-MISSING"):
        OrtSession.load(tmp_path)
    with refused("E-BUNDLE-MISSING"):
        OrtSession.load(tmp_path / "nowhere")
