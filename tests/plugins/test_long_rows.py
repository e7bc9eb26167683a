"""Where samples of a long prompt's keys lie: numbers that pass 32 bits, in the interpreter."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from gqa_plugins.grouped_attention.long_rows import sampled

pytestmark = pytest.mark.kernels
SAMPLES, KEYS, WIDTH = 65536, 64, 131072


@triton.jit
def _take(fractions_ptr, out_ptr, tile, width, SAMPLES: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    index, present, _ = sampled(fractions_ptr, 0, tile, width, SAMPLES, BLOCK_KEYS)
    tl.store(out_ptr + tl.arange(0, BLOCK_KEYS), index, mask=present)


@pytest.mark.parametrize("tile", [0, 511, 512, 1023])
def test_samples_lie_where_the_contract_puts_them_however_many_there_are(tile: int) -> None:
    """From 32,768 samples on, a sample's number times the steps of a fraction passes 32 bits."""
    fractions, out = torch.zeros(SAMPLES, dtype=torch.int32), torch.full((KEYS,), -1, dtype=torch.int32)
    _take[(1,)](fractions, out, tile, WIDTH, SAMPLES=SAMPLES, BLOCK_KEYS=KEYS)
    expected = (torch.arange(KEYS) + tile * KEYS) * WIDTH // SAMPLES
    assert torch.equal(out.long(), expected)
