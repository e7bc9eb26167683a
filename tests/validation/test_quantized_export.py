"""Bundles whose weights the export quantized: the reference quantizes them again and sees what a bundle did wrong."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from gqa_models import write_tiny
from refusal import refused
from small_text import SENTENCES, byte_tokenizer

import gqa_export as gqa
from gqa_export.bundle.manifest import MANIFEST, FileFact, Manifest
from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.errors import InvalidBundle
from gqa_export.quantizing.importance import FILE, importance_file
from gqa_export.validation.accuracy_level import rounded_inputs
from gqa_export.validation.loss import LossRequest
from gqa_export.validation.quantization_claims import check_weights_are_as_stated
from gqa_export.validation.quantized_reference import requantized
from gqa_export.validation.validate import validate

pytestmark = pytest.mark.whole_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = write_tiny("llama", tmp_path_factory.mktemp("ck") / "checkpoint", num_hidden_layers=2)
    byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def int4(checkpoint, tmp_path_factory):
    return gqa.export(checkpoint, tmp_path_factory.mktemp("b") / "bundle", capacity=64, quantize="int4")


def test_what_was_quantized_is_exact_against_what_is_quantized_again(int4, checkpoint):
    found = int4.validate(checkpoint, steps=2, reference=checkpoint).check()
    assert (found.export_exact, found.as_shipped, found.activations) == (True, True, "int8")
    assert found.loss.reference_dtype == "float32"  # the checkpoint as it is, not as it was quantized
    assert found.loss.kl_mean > 1e-3


def test_a_matrix_that_the_checkpoint_does_not_have_is_refused(int4, checkpoint, tmp_path):
    shutil.copytree(int4.folder, tmp_path / "b")
    weights = int4.manifest.quantization.weights
    wrong = (replace(weights[0], name="model.layers.9.mlp.up_proj.weight"), *weights[1:])
    manifest = replace(int4.manifest, quantization=replace(int4.manifest.quantization, weights=wrong))
    (tmp_path / "b" / MANIFEST).write_text(manifest.to_json())
    with refused("E-BUNDLE-QUANTIZATION", InvalidBundle):
        validate(tmp_path / "b", checkpoint, steps=2)


@pytest.mark.parametrize("fields", [{"name": "model.norm.weight"}, {"name": "model.layers.9.mlp.up_proj.weight"},
                                    {"experts": 7}, {"experts": 7, "transposed": True}])
@pytest.mark.parametrize("again", [True, False])
def test_what_the_checkpoints_shapes_do_not_allow_is_refused(int4, checkpoint, fields, again):
    """By what quantizes the weights again, and by what rounds the inputs of their products."""
    quantization, opened = int4.manifest.quantization, open_checkpoint(checkpoint)
    wrong = replace(next(each for each in quantization.weights if "up_proj" in each.name), **fields)
    manifest = replace(int4.manifest, quantization=replace(quantization, weights=(wrong,)))
    assert Manifest.from_json(manifest.to_json()) == manifest, "the manifest alone does not tell"
    model = None if again else load_model(opened, "float32")
    with refused("E-BUNDLE-QUANTIZATION", InvalidBundle):
        requantized(opened, manifest) if again else rounded_inputs(manifest, opened, model)


@pytest.mark.parametrize("lies", [
    {"lossless": True}, {"bits": 8}, {"bits": 8, "rounded_bits": 8}, {"block": 16}, {"block": 16, "rounded_block": 16},
    {"bytes": 8}, {"bytes": 1 << 20}, {"stored": "banana"}, {"stored": "float16"}, {"method": "int8"},
    {"method": "nvfp4"}, {"method": "keep"}])
def test_what_a_manifest_says_of_a_weight_is_held_against_the_checkpoint(int4, checkpoint, lies, tmp_path):
    """Nothing that a run compares shows it, and a user chooses by it."""
    quantization, opened = int4.manifest.quantization, open_checkpoint(checkpoint)
    fields = {name: value for name, value in lies.items() if name != "method"}
    weights = tuple(replace(each, **fields) if "layers.1.mlp.up_proj" in each.name else each
                    for each in quantization.weights)
    stated = replace(quantization, weights=weights, method=lies.get("method", quantization.method))
    manifest = replace(int4.manifest, quantization=stated)
    assert Manifest.from_json(manifest.to_json()) == manifest, "the manifest alone does not tell"
    parameters = dict(load_model(opened, "float32").named_parameters())
    with refused("E-BUNDLE-QUANTIZATION", InvalidBundle):
        check_weights_are_as_stated(opened, manifest, parameters, requantized(opened, manifest))


def test_a_matrix_that_is_called_lossless_and_was_rounded_is_not_validated(int4, checkpoint, tmp_path):
    shutil.copytree(int4.folder, tmp_path / "b")
    quantization = int4.manifest.quantization
    weights = tuple(replace(each, lossless=True) for each in quantization.weights)
    manifest = replace(int4.manifest, quantization=replace(quantization, weights=weights))
    (tmp_path / "b" / MANIFEST).write_text(manifest.to_json())
    with refused("E-BUNDLE-QUANTIZATION", InvalidBundle):
        validate(tmp_path / "b", checkpoint, steps=2)


def test_what_is_said_of_other_columns_is_refused(int4, checkpoint, tmp_path):
    """A file that was exchanged: numpy would stop at it, or repeat one number for all columns."""
    quantization = replace(int4.manifest.quantization, calibration="0" * 64)
    weight = next(each for each in quantization.weights if "up_proj" in each.name)
    manifest = replace(int4.manifest, files={FILE: FileFact(0)}, quantization=replace(quantization, weights=(weight,)))
    for size in (1, 7):
        (tmp_path / FILE).write_bytes(importance_file({weight.name: np.ones(size, np.float32)}))
        with refused("E-BUNDLE-CALIBRATION", InvalidBundle):
            requantized(open_checkpoint(checkpoint), manifest, folder=tmp_path)


def test_a_bundle_holds_what_its_calibration_text_said(checkpoint, tmp_path):
    """Without that file the text is needed."""
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text("".join(SENTENCES) * 3)
    other.write_text("".join(SENTENCES[::-1]) * 3)
    bundle = gqa.export(checkpoint, tmp_path / "b", capacity=64, quantize="int4", calibrate=text, kv_cache="int8")
    found = bundle.validate(checkpoint, steps=2)
    assert found.export_exact, found.failure
    assert found.as_shipped, found.failure
    with refused("E-VALIDATE-CALIBRATION"):  # whose scales these are not, though nothing is read from it
        requantized(open_checkpoint(checkpoint), bundle.manifest, other, bundle.folder)
    kept = {name: fact for name, fact in bundle.manifest.files.items() if name != FILE}
    assert len(kept) == len(bundle.manifest.files) - 1
    without = replace(bundle.manifest, files=kept)
    (tmp_path / "b" / MANIFEST).write_text(without.to_json())
    (tmp_path / "b" / FILE).unlink()
    for given in (None, other):
        with refused("E-VALIDATE-CALIBRATION"):
            validate(tmp_path / "b", checkpoint, steps=2, loss=LossRequest(calibrate=given))
    again = requantized(open_checkpoint(checkpoint), without, text)
    assert set(again) == {weight.name for weight in without.quantization.weights}


@pytest.mark.parametrize(("target", "method", "block", "held"), [
    ("onnx", "rules", 32, (4, 32)), ("trt-native", "rules", 256, (4, 32)), ("ort", "int8", 128, (8, 32))])
def test_a_matrix_is_quantized_again_as_it_was_where_the_graph_holds_it_in_other_blocks_or_bits(
        tmp_path, target, method, block, held):
    """DequantizeLinear has no codes of two bits, and no operator blocks of 96: `down_proj` has one scale a row."""
    source = write_tiny("llama", tmp_path / "ck", num_hidden_layers=1, intermediate_size=96)
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nmatch = "*"\nbits = 2\n')
    bundle = gqa.export(source, tmp_path / "b", target=target, capacity=64, dtype="fp32", block=block,
                        quantize=rules if method == "rules" else method)
    found = {each.name: each for each in bundle.manifest.quantization.weights}["model.layers.0.mlp.down_proj.weight"]
    assert (found.bits, found.block) == held
    #     assert (found.rounded_bits, found.rounded_block) == (2 if method == "rules" else 8, min(block, 96))
    line = next(line for line in bundle.manifest.quantization.lines() if "down_proj" in line)
    assert f"{held[0]} bits, {found.operator}, block {held[1]}" in line
    assert ("rounded to 2 bits" in line) == (method == "rules")
    assert ("a scale for 96 columns" in line) == (block > 32)
    verdict = validate(tmp_path / "b", source, steps=2)
    assert verdict.passed, verdict.first
