"""The rule of a quantized cache: codes, bytes, scales."""

from __future__ import annotations

import numpy as np
import pytest

from gqa_export.quantized.kv_codes import choose_scale, decode, encode, encode_fp8, limits, pack, unpack


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_rounded_to_even_and_clipped_at_both_ends(bits):
    low, high = limits(bits)
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9, high + 0.4, low - 0.4], np.float32) * np.float32(0.25)
    assert encode(values, 0.25, bits).tolist() == [0, 2, 2, 0, -2, high, low, high, low]


@pytest.mark.parametrize("bits", [8, 4])
def test_packing_is_undone(bits):
    low, high = limits(bits)
    codes = np.random.default_rng(bits).integers(low, high + 1, (2, 3, 5, 16)).astype(np.int8)
    stored = pack(codes, bits)
    assert stored.dtype == (np.int8 if bits == 8 else np.uint8)
    assert stored.shape[-1] == 16 * bits // 8
    assert np.array_equal(unpack(stored, bits), codes)
    assert np.array_equal(decode(stored, 0.5, bits), codes * np.float32(0.5))


def test_of_four_bits_the_earlier_element_is_in_the_low_half():
    assert pack(np.array([-8, 7], np.int8), 4).tolist() == [0xF0]


@pytest.mark.parametrize("bits", [8, 4])
def test_the_scale_loses_no_more_than_the_one_that_clips_nothing(bits):
    values = np.random.default_rng(1).standard_t(4, 20000).astype(np.float32)
    scale, clipped = choose_scale(values, bits)
    whole = np.abs(values).max() / limits(bits)[1]

    def error(step):
        return ((decode(pack(encode(values, step, bits), bits), step, bits) - values) ** 2).mean()

    assert error(scale) <= error(whole)
    rounded = np.rint(values / np.float32(scale))
    assert clipped == pytest.approx(((rounded < limits(bits)[0]) | (rounded > limits(bits)[1])).mean())
    assert 0 < clipped < 0.02


def test_a_tensor_of_zeros_has_a_scale():
    scale, clipped = choose_scale(np.zeros(7), 8)
    assert scale > 0
    assert clipped == 0


def test_fp8_codes_are_the_nearest_floats_and_end_at_448():
    values = np.array([0, 0.3, -1.0625, 1.1875, 447, 500, 1e9, -1e9], np.float32)
    assert encode_fp8(values, 1.0).astype(np.float32).tolist() == [0, 0.3125, -1, 1.25, 448, 448, 448, -448]
    assert np.isnan(encode_fp8(np.array([np.nan], np.float32), 1.0).astype(np.float32)).all()


def test_the_scale_of_fp8_loses_less_than_that_of_int8_where_few_numbers_are_large():
    """Keys with a few large features, as attention has them."""
    values = np.random.default_rng(9).normal(0, 1, 60_000).astype(np.float32)
    values[::500] *= 60
    losses = []
    for fp8 in (True, False):
        scale, clipped = choose_scale(values, 8, fp8)
        codes = encode_fp8(values, scale) if fp8 else encode(values, scale, 8)
        losses.append(float(((decode(codes, scale, 8) - values) ** 2)[np.abs(values) < 4].mean()))
        assert clipped < 0.01
    assert losses[0] < 0.5 * losses[1]
