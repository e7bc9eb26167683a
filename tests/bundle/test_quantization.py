"""What a manifest says of quantized weights."""

from __future__ import annotations

from dataclasses import replace

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


def test_matrices_that_are_alike_have_one_line() -> None:
    alike = tuple(replace(WEIGHTS[0], name=f"model.layers.{layer}.mlp.up_proj.weight") for layer in range(2))
    lines = Quantization("keep", "int8", (*alike, WEIGHTS[2])).lines()
    assert len(lines) == 3
    assert "model.layers.*.mlp.up_proj.weight (2 of them)" in lines[1]
    assert "200 bytes" in lines[1]
    assert "no operator" in lines[2]
