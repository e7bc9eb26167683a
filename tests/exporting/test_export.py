"""The main job, end to end: every feature of attention, exported to every target, passes `validate`."""

from __future__ import annotations

import gqa_models
import onnx
import pytest
from glassllm_checkpoint import write_glassllm
from shared_reference import reference_of

from gqa_export import graph_io
from gqa_export.bundle.manifest import MODEL
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.errors import EXIT_PASSED
from gqa_export.exporting.expected_weights import expected_streams
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.validation.validate import validate

pytestmark = pytest.mark.whole_model

CAPACITY = 128
"""beyond every window (16) and every length that a rotary scaling starts from (64)"""
WINDOWS = ("mistral", "gemma2", "gemma3", "gpt_oss", "phimoe")
STEPS = {True: 18, False: 8}
"""decode steps of `ort` where there is a window, 16: more than that many, so that a ring that wraps shows; elsewhere
as many as uneven steps take (rows that bring several tokens, or none). The 32 that `validate` takes by itself are run
for a real model (`test_a_real_small_model_passes_validation`)."""
# What each name is for: window, QKV bias, QK-norm, softcap with alternating windows, two rotary tables, packed QKV,
# sinks and experts, multipliers, interleaved and partial rotary, the two ends of grouping, tied heads, NoPE layers,
# absolute positions, merged experts, a window that is only in the mask, and every rotary scaling.
FAMILIES = ("llama", "llama_mha", "llama_mqa", "llama_tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3",
            "gpt_oss", "granite", "cohere", "stablelm", "smollm3", "gpt2", "mixtral", "phimoe", "llama_linear",
            "llama_llama3", "llama_yarn")
PREDICTED = ("llama", "llama_mha", "llama_mqa", "llama_tied", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3",
             "llama_linear", "llama_llama3", "llama_yarn")
"""families whose weights are written while the model is traced"""
# Every family on `ort`. What makes a family special is in its trace, which all targets share, but for what a target
# writes anew: attention (windows, sinks, softcap, grouping), rotary (partial, interleaved, two tables, none) and norms
# (`onnx`). Each of these once a target, with the growing cache or with the static one.
GROWING = [(name, "ort") for name in FAMILIES] + [
    ("gemma3", "onnx"), ("gpt_oss", "onnx"), ("stablelm", "onnx"), ("smollm3", "onnx"), ("llama_mqa", "onnx"),
    ("gpt2", "onnx"), ("gpt_oss", "portable"), ("cohere", "portable"), ("llama_mqa", "portable")]
STATIC = [("gemma2", "ort"), ("gpt_oss", "ort"), ("phi3", "ort"), ("gemma2", "onnx"), ("mistral", "onnx"),
          ("cohere", "onnx"), ("gemma2", "portable"), ("gpt_oss", "portable")]
EXPORTS = sorted([(*pair, "growing") for pair in GROWING] + [(*pair, "static") for pair in STATIC])
"""in the order of names: what PyTorch computes of a checkpoint is shared by the exports that follow one another"""


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory):
    """A tiny checkpoint by name, written once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(name):
        folder = root / name
        return folder if folder.exists() else gqa_models.write_tiny(name, folder)

    return get


def passes(checkpoint, folder, steps=32, shared=False, **options):
    """Export, validate, and say what fell back. shared: the checkpoint is fp32, and other exports of it follow."""
    export = export_onnx(checkpoint, folder, ExportOptions(**{"capacity": CAPACITY, **options}))
    reference = reference_of(checkpoint, export.manifest) if shared else None
    verdict = validate(folder, checkpoint, steps=steps, check_hashes=False, reference=reference)
    assert verdict.exit_code == EXIT_PASSED, verdict
    return export.manifest


def fallbacks(manifest, target):
    """The layers that fell back are those that the target cannot hold: ai.onnx Attention has no sinks, and its softcap
    meant two things over time."""
    cannot = {layer.layer for layer in manifest.spec.layers if layer.sinks or layer.softcap}
    return {fallback.layer for fallback in manifest.fallbacks} == (cannot if target == "onnx" else set())


@pytest.mark.parametrize(("name", "target", "cache"), EXPORTS)
def test_an_export_passes_validation(checkpoint_of, tmp_path, name, target, cache):
    steps = STEPS[target == "ort" and name in WINDOWS]
    manifest = passes(checkpoint_of(name), tmp_path / "bundle", steps, target=target, cache=cache, shared=True)
    assert manifest.inputs[2].shape[2] == (graph_io.CAPACITY if cache == "static" else graph_io.PAST)
    assert fallbacks(manifest, target)
    if target == "ort":
        opened = open_checkpoint(checkpoint_of(name))
        expected = expected_streams(opened, ExportOptions(), "float32")
        assert bool(expected) == (name in PREDICTED)
        assert not expected or [(stream.offset, stream.nbytes) for stream in expected] == places(tmp_path / "bundle")


def places(bundle):
    """Offset and length of each tensor in model.onnx.data."""
    model = onnx.load(bundle / MODEL, load_external_data=False)
    found = [{entry.key: entry.value for entry in tensor.external_data} for tensor in model.graph.initializer]
    return sorted({(int(place["offset"]), int(place["length"])) for place in found if place})


@pytest.mark.parametrize("weights", ["link", "inplace"])
def test_weights_used_where_they_are_give_the_same_answers(checkpoint_of, tmp_path, weights):
    checkpoint = gqa_models.write_tiny("llama_tied", tmp_path / "checkpoint")
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    folder = checkpoint if weights == "inplace" else tmp_path / "bundle"
    manifest = passes(checkpoint, folder, weights=weights, steps=8)
    assert manifest.bytes_copied == 0 < manifest.bytes_linked
    assert {name: (checkpoint / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("target", ["ort", "onnx"])
def test_a_real_small_model_passes_validation(tmp_path, target):
    checkpoint = write_glassllm(tmp_path / "glassllm")
    assert len(passes(checkpoint, tmp_path / "bundle", capacity=0, target=target,
                      dtype="fp32").spec.layers) == 4


def test_merged_experts_cannot_be_linked_and_are_written(checkpoint_of, tmp_path):
    manifest = passes(checkpoint_of("mixtral"), tmp_path / "bundle", weights="link", steps=4)
    assert manifest.bytes_copied > 0 < manifest.bytes_linked


def test_last_logits_are_the_last_of_all_logits(checkpoint_of, tmp_path):
    manifest = passes(checkpoint_of("llama"), tmp_path / "bundle", logits="last", steps=8)
    assert manifest.outputs[0].shape[1] == 1


def test_half_precision_bundles_pass_within_their_own_yardstick(checkpoint_of, tmp_path):
    checkpoint = gqa_models.write_tiny("llama", tmp_path / "checkpoint", dtype="float16")
    assert passes(checkpoint, tmp_path / "bundle", steps=8).dtype == "float16"
    assert passes(checkpoint, tmp_path / "wide", steps=8, dtype="fp32").dtype == "float32"


def test_the_fp32_twin_of_a_bf16_bundle_can_be_checked_on_a_cpu(tmp_path):
    checkpoint = gqa_models.write_tiny("qwen2", tmp_path / "checkpoint", dtype="bfloat16")
    export_onnx(checkpoint, tmp_path / "bundle", ExportOptions(capacity=CAPACITY))
    verdict = validate(tmp_path / "bundle", checkpoint, steps=8, as_dtype="fp32")
    assert verdict.exit_code == EXIT_PASSED, verdict
