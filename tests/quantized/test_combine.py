"""Packed codes of any width, and matrices made of others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from gqa_export.quantized.combine import APART, joinable, joined, one_scale, reordered, some_rows
from gqa_export.quantized.experts import matrix_named
from gqa_export.quantized.matrix import QuantizedMatrix, Stripe
from gqa_export.quantized.packed_bits import pack_bits, unpack_bits


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_come_back_whatever_their_width(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, 37), np.uint8)
    stored = pack_bits(codes, bits)
    assert stored.shape == (3, -(-37 * bits // 8))
    np.testing.assert_array_equal(unpack_bits(stored, bits, 37), codes)
    word = sum(int(code) << bits * place for place, code in enumerate(codes[0]))
    assert stored[0].tobytes() == word.to_bytes(stored.shape[1], "little")


def made(rows: int, seed: int, block: int = 4) -> QuantizedMatrix:
    rng = np.random.default_rng(seed)
    stripe = Stripe(rng.integers(0, 16, (rows, 8), np.uint8), rng.random((rows, 8 // block), np.float32),
                    rng.integers(0, 16, (rows, 8 // block)))
    return QuantizedMatrix((rows, 8), 4, block, "int", "zero", "test", lambda start, stop: stripe.rows(
        slice(start, stop)), tensors=(f"part {seed}",))


def test_rows_in_another_order_and_one_below_the_other() -> None:
    first, second = made(6, 1), made(3, 2)
    order = np.array([1, 0, 5, 4, 3, 2])
    np.testing.assert_array_equal(reordered(first, order).dequantize(), first.dequantize()[order])
    np.testing.assert_array_equal(reordered(first, order).dequantize(2, 4), first.dequantize()[[5, 4]])
    np.testing.assert_array_equal(some_rows(first, 2, 5).dequantize(), first.dequantize()[2:5])
    both = joined([first, second])
    whole = np.concatenate([first.dequantize(), second.dequantize()])
    assert (both.shape, both.tensors) == ((9, 8), ("part 1", "part 2"))
    for start in range(10):
        for stop in range(start, 10):
            np.testing.assert_array_equal(both.dequantize(start, stop), whole[start:stop])
    assert joined([first, second], (3, 3, 8)).parameter().shape == (3, 3, 8)


@pytest.mark.parametrize("rearranged", [lambda m: reordered(m, np.arange(m.rows)[::-1]), lambda m: some_rows(m, 2, 5),
                                        lambda m: joined([m, m]), lambda m: matrix_named("w[1/2]", m)])
def test_a_stored_tensor_is_not_what_other_rows_are_made_of(rearranged: Callable[[QuantizedMatrix], QuantizedMatrix]
                                                            ) -> None:
    """`--weights link` would take the bytes of the whole for them."""
    found = rearranged(replace(made(6, 1), in_place="w.codes", scales_in_place="w.scales"))
    assert (found.in_place, found.scales_in_place) == ("", "")


def test_scales_that_were_multiplied_are_not_the_stored_ones() -> None:
    found = one_scale(replace(made(6, 1), global_scale=0.5, in_place="w.codes", scales_in_place="w.scales"))
    assert (found.in_place, found.scales_in_place) == ("w.codes", "")


def test_matrices_of_different_forms_are_not_joined() -> None:
    assert not joinable([made(3, 1), made(3, 2, block=2)])
    with pytest.raises(ValueError, match="different forms"):
        joined([made(3, 1), made(3, 2, block=2)])


@pytest.mark.parametrize(("scales", "whole", "reason"), [
    ((0.5, 0.5), 0.5, ""), ((None, None), None, ""), ((0.5, 0.25), None, APART), ((0.5, None), None, APART)])
def test_a_whole_has_the_scale_that_its_parts_share_or_says_that_they_differ(scales: tuple, whole: float | None,
                                                                             reason: str) -> None:
    parts = [replace(made(6, seed), input_scale=scale) for seed, scale in enumerate(scales)]
    found = some_rows(joined([joined(parts), joined(parts)]), 0, 2)
    assert (found.input_scale, found.no_input_scale) == (whole, reason)
