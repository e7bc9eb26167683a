"""What a manifest says of quantized weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
from refusal import refused

from gqa_export.bundle.manifest import Manifest
from gqa_export.bundle.quantization import PLAIN, Quantization, QuantizedWeight
from gqa_export.errors import InvalidBundle
from gqa_export.spec import ModelSpec

MANIFEST = Manifest("ort", "float32", "growing", 8, "all", "copy", ModelSpec("x", "", 5, 6, 8, "", ()), (), ())
WEIGHTS = (QuantizedWeight("a", "GGUF Q4_1", 4, 32, True, "MatMulNBits", 100),
           QuantizedWeight("b", "GGUF Q4_1", 4, 32, True, "MatMulNBits", 50),
           QuantizedWeight("c", "FP8 e4m3", 32, 0, True, PLAIN, 400, "no operator"))


def test_a_manifest_keeps_what_it_says_of_quantized_weights() -> None:
    manifest = replace(MANIFEST, quantization=Quantization("keep", "int8", WEIGHTS))
    assert Manifest.from_json(manifest.to_json()) == manifest
    with refused("E-BUNDLE-MANIFEST", InvalidBundle):
        Manifest.from_json(manifest.to_json().replace('"activations": "int8"', '"activations": "int4"'))


CODES, STACK = WEIGHTS[0], replace(WEIGHTS[0], name="s", experts=4, transposed=True)


@pytest.mark.parametrize("weight", [
    CODES, STACK, replace(CODES, bits=2), replace(CODES, bits=8),
    replace(CODES, rounded_bits=2, rounded_block=64), replace(CODES, bits=4, operator="MatMulBnb4"),
    replace(CODES, kind="e4m3", bits=8, operator="DequantizeLinear"),
    replace(STACK, kind="e4m3", bits=8, operator="DequantizeLinear"),
    replace(CODES, kind="e2m1", block=16, operator="DequantizeLinear"), replace(WEIGHTS[2], bits=16)])
def test_forms_that_exports_make_are_read(weight: QuantizedWeight) -> None:
    """A checkpoint's own FP8 experts are kept as a stack, transposed too."""
    manifest = replace(MANIFEST, quantization=Quantization("keep", "exact", (weight,)))
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_codes_that_an_export_did_not_round_are_the_checkpoints_own() -> None:
    """Beside others that it rounded. What was stored as floating-point numbers has none."""
    assert [CODES.kept(method) for method in ("keep", "dequantize", "int4", "rules")] == [True, False, True, True]
    for rounded in (replace(CODES, rounded_bits=4), replace(CODES, stored="bfloat16"), WEIGHTS[2]):
        assert not rounded.kept("rules")
    manifest = replace(MANIFEST, quantization=Quantization("int8", "exact", (replace(STACK, bits=8, kind="e4m3"),)))
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(("weight", "words"), [
    (replace(CODES, bits=5), "a code of kind int has 2 or 4 or 8 bits, found 5"),
    (replace(CODES, rounded_bits=5, rounded_block=32), "2 or 4 or 8 bits, found 5"),
    (replace(WEIGHTS[2], rounded_bits=4), "neither blocks nor"),
    (replace(CODES, bits=16), "2 or 4 or 8 bits, found 16"),
    (replace(CODES, bits=4, kind="e4m3"), "kind e4m3 has 8 bits, found 4"),
    (replace(CODES, bits=8, kind="e2m1"), "kind e2m1 has 4 bits, found 8"),
    (replace(CODES, block=0), "a block of at least 1 column, found 0"),
    (replace(CODES, operator="else", block=0), "codes of else have a block"),
    (replace(CODES, transposed=True), "stacked experts alone are"),
    (replace(STACK, bits=8, kind="e4m3", rounded_bits=8, rounded_block=32),
     "an export by int8 makes no e4m3 codes of experts, found 4"),
    (replace(STACK, kind="e2m1", rounded_bits=4, rounded_block=16), "an export by int8 makes no e2m1 codes of experts"),
    (replace(CODES, operator=PLAIN), "neither blocks nor experts"),
    (replace(WEIGHTS[2], kind="e4m3"), "nor a kind of codes"), (replace(WEIGHTS[2], experts=4), "neither blocks"),
    (replace(WEIGHTS[2], operator="MatMulNBits"), "found 0")])
def test_fields_that_cannot_be_together_are_refused(weight: QuantizedWeight, words: str) -> None:
    """`validate` quantizes again what the manifest says: each of these was an error without a code there."""
    manifest = replace(MANIFEST, quantization=Quantization("int8", "exact", (CODES, weight)))
    with refused("E-BUNDLE-MANIFEST", InvalidBundle) as refusal:
        Manifest.from_json(manifest.to_json())
    assert "quantization.weights[1]: " in refusal.error.what
    assert words in refusal.error.what


def test_inputs_that_are_not_rounded_though_they_were_to_be_have_a_reason() -> None:
    """A rounding that is left out in graph and manifest alike is not found by comparing them, nor by numbers."""
    exact = replace(CODES, kind="e4m3", bits=8, operator="DequantizeLinear")
    rounded = replace(exact, inputs="e4m3", input_scale=0.5)
    for weight in (rounded, replace(exact, inputs_reason="it has no scale"), WEIGHTS[2]):
        manifest = replace(MANIFEST, quantization=Quantization("keep", "same", (weight,)))
        assert Manifest.from_json(manifest.to_json()) == manifest
    silent = replace(MANIFEST, quantization=Quantization("keep", "same", (rounded, exact)))
    with refused("E-BUNDLE-MANIFEST", InvalidBundle) as refusal:
        Manifest.from_json(silent.to_json())
    assert "quantization.weights[1]: activations are \"same\", its inputs are not rounded" in refusal.error.what


def test_matrices_that_are_alike_have_one_line() -> None:
    alike = tuple(replace(WEIGHTS[0], name=f"model.layers.{layer}.mlp.up_proj.weight") for layer in range(2))
    lines = Quantization("keep", "int8", (*alike, WEIGHTS[2])).lines()
    assert len(lines) == 3
    assert "model.layers.*.mlp.up_proj.weight (2 of them)" in lines[1]
    assert "200 bytes" in lines[1]
    assert "no operator" in lines[2]
