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


def test_counts_put_the_largest_share_first() -> None:
    assert list(Quantization("keep", "int8", WEIGHTS).counts().items()) == [
        ("32 bits, plain", (1, 400)), ("4 bits, block 32, MatMulNBits", (2, 150))]
