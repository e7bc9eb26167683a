"""Parts of packed matrices: the same bytes in whatever stripes they are read, as many as are announced, and nothing of
them kept."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from gqa_export.quantized import packed_bits, packing
from gqa_export.quantized.facts import Form
from gqa_export.quantized.matrix import QuantizedMatrix, Stripe
from gqa_export.quantized.packed_bits import pack_bits
from gqa_export.quantized.packing import Packer

BLOCK = 3


def made(rows: int, columns: int, bits: int) -> tuple[Stripe, QuantizedMatrix]:
    """Random codes with zero points."""
    random, blocks = np.random.default_rng(7), -(-columns // BLOCK)
    whole = Stripe(random.integers(0, 1 << bits, (rows, columns)).astype(np.uint8),
                   random.random((rows, blocks), np.float32) + 1,
                   random.integers(0, 1 << bits, (rows, blocks)).astype(np.uint8))
    return whole, QuantizedMatrix((rows, columns), bits, BLOCK, "int", "zero", "test",
                                  lambda start, stop: whole.rows(slice(start, stop)))


@pytest.fixture
def small_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows of nine columns are read at once, and 24 codes are packed."""
    monkeypatch.setattr(packing, "STRIPE_BYTES", 3 * 9 * 4)
    monkeypatch.setattr(packed_bits, "STRIPE_CODES", 24)


@pytest.mark.usefixtures("small_stripes")
@pytest.mark.parametrize("columns_first", [False, True], ids=["rows first", "columns first"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(13, 9), (12, 9), (13, 12), (2, 9)])
def test_an_odd_number_of_codes_or_blocks_in_a_stripe_moves_nothing(rows: int, columns: int, bits: int,
                                                                    columns_first: bool) -> None:
    """The codes of DequantizeLinear lie one after the other, without a gap at the end of a row or a stripe."""
    whole, matrix = made(rows, columns, bits)
    packer = Packer(matrix, Form("DequantizeLinear", bits, BLOCK, zeros=True, columns_first=columns_first))
    for part, values in (("codes", whole.codes), ("zero", whole.zero), ("scale", whole.scale)):
        ordered = np.ascontiguousarray(values.T if columns_first else values)
        wanted = ordered.tobytes() if part == "scale" else pack_bits(ordered.reshape(1, -1), bits).tobytes()
        assert b"".join(bytes(chunk) for chunk in packer.chunks(part)) == wanted, part
        assert len(wanted) == packer.nbytes(part)
    assert packer._kept == {}


@pytest.mark.parametrize("per", ["tensor", "row"])
def test_one_scale_for_all_is_not_kept_for_every_row(per: str) -> None:
    codes, scale = np.zeros((8, 16), np.uint8), np.full((8, 1), 0.5, np.float32)
    whole = Stripe(codes, scale)
    matrix = QuantizedMatrix((8, 16), 8, 16, "e4m3", "none", "FP8", lambda a, b: whole.rows(slice(a, b)), row_block=8)
    packer = Packer(matrix, Form("DequantizeLinear", 8, 16, kind="e4m3", scales="float32", per=per))
    sizes = {part: sum(chunk.nbytes for chunk in packer.chunks(part)) for part in ("codes", "scale")}
    assert sizes == {"codes": 128, "scale": 4 if per == "tensor" else 32}
    assert packer._kept == {}


def test_columns_first_take_half_as_much_again_as_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte a code, and the packed half: 1.5. It was 4.3 while stripes and the joined matrix were held together."""
    monkeypatch.setattr(packing, "STRIPE_BYTES", 1 << 17)
    monkeypatch.setattr(packed_bits, "STRIPE_CODES", 1 << 15)
    codes, scale = np.zeros((1024, 1024), np.uint8), np.ones((1024, 8), np.float32)
    whole = Stripe(codes, scale, np.zeros((1024, 8), np.uint8))
    matrix = QuantizedMatrix((1024, 1024), 4, 128, "int", "zero", "test", lambda a, b: whole.rows(slice(a, b)))
    packer = Packer(matrix, Form("DequantizeLinear", 4, 128, zeros=True, columns_first=True))
    tracemalloc.start()
    try:
        assert sum(chunk.nbytes for chunk in packer.chunks("codes")) == codes.size // 2
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.8 * codes.size, "stripes, scales and zero points are the rest"
