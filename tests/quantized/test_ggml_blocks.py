"""Every kept type of ggml against the package gguf's own dequantization, on random bytes and on blocks it made."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from ggml_bytes import stored_rows
from gguf.quants import dequantize, quantize

from gqa_export.checkpoint.quantized.ggml_blocks import BLOCK_TYPES, stripe_of
from gqa_export.quantized.matrix import QuantizedMatrix


def matrix_of(kind: int, raw: np.ndarray) -> QuantizedMatrix:
    block = BLOCK_TYPES[kind]
    shape = len(raw), raw.shape[1] // block.size * block.elements
    return QuantizedMatrix(shape, block.bits, block.block, block.kind, block.offset, block.name,
                           lambda start, stop: stripe_of(block, raw[start:stop]))


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: BLOCK_TYPES[kind].name)
def test_codes_and_scales_are_the_packages_values(kind: int) -> None:
    block = BLOCK_TYPES[kind]
    raw = stored_rows(block.name, block.size)
    assert (block.elements, block.size) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    expected = dequantize(raw, gguf.GGMLQuantizationType(kind))
    made = matrix_of(kind, raw)
    found = made.dequantize()
    if block.offset == "none":  # one product of few digits: float32 holds it, and the package does not round
        np.testing.assert_array_equal(found.astype(np.float32), expected)
    else:  # the package rounds product and sum
        parts = np.abs(made.stripe().codes * np.repeat(np.abs(made.stripe().scale), block.block, axis=1))
        assert np.all(np.abs(found - expected) <= 2.0**-23 * (parts + np.abs(found)))
    assert made.stripe(1, 1).codes.shape == (0, made.columns)
    np.testing.assert_array_equal(made.dequantize(1, 3), found[1:])
    codes, least = made.stripe().codes, 0 if made.stripe().codes.dtype == np.uint8 else -(1 << block.bits - 1)
    assert codes.min() >= least
    assert codes.max() < least + (1 << block.bits)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_blocks_that_the_package_made(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    weights = np.random.default_rng(1).normal(0, .1, (4, 64)).astype(np.float32)
    made = matrix_of(int(kind), quantize(weights, kind))
    assert np.abs(made.dequantize() - weights).max() < .06
    np.testing.assert_allclose(made.dequantize(), dequantize(quantize(weights, kind), kind), rtol=3e-7, atol=3e-8)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "IQ4_XS"])
def test_swapped_nibbles_are_other_values(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    raw = stored_rows(name, BLOCK_TYPES[kind].size)
    expected = matrix_of(int(kind), raw).dequantize()
    assert np.abs(matrix_of(int(kind), raw >> 4 | raw << 4).dequantize() - expected).max() > .1 or \
        not np.isfinite(matrix_of(int(kind), raw >> 4 | raw << 4).dequantize()).all()
