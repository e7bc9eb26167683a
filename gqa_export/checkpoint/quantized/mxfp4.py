"""MXFP4 as GPT-OSS has it: experts of e2m1 in blocks of 32, each with a power of two. They lie the other way round than
the model's parameters, and are turned as they are dequantized.

Source: the OCP Microscaling Formats specification; `integrations/mxfp4.py` of transformers for the names.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np

from ...quantized.matrix import QuantizedMatrix
from .codes import nibbles
from .description import Description
from .scales import scales_of
from .stored import E8M0, Stored, floats

BLOCK = 32
HALVES = (2.0**-23, 2.0**15)
"""powers of two that are numbers of float16, and so are their halves"""


def read_mxfp4(description: Description, stored: Stored) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Every quantized weight by its name.

    Raises:
        InvalidCheckpoint: blocks lack their scales, or do not fit them.
    """
    for name in stored.modules("_blocks"):
        packed = stored.take(f"{name}_blocks", ("uint8",))
        if len(packed.shape) != 4 or packed.shape[-1] != BLOCK // 2:
            raise stored.shape(f"{name}_blocks", f"expected [experts, rows, blocks, {BLOCK // 2}]")
        shape = (*packed.shape[:-2], packed.shape[-2] * BLOCK)
        scale = stored.take(f"{name}_scales", ("uint8", E8M0), packed.shape[:-1])
        powers = floats(scale)
        if prod(scale.shape) and not np.isfinite(powers).all():
            raise stored.value(f"{name}_scales", "has the exponent 255, which is not a number")
        flat = type(packed)(packed.path, packed.offset, packed.nbytes, packed.dtype, (*shape[:-1], shape[-1] // 2))
        # half of one is what operators with whole codes take
        half = not powers.size or HALVES[0] <= powers.min() <= powers.max() <= HALVES[1]
        scales = scales_of(stored, f"{name}_scales", scale, shape, group=BLOCK)
        scales = scales._replace(dtype="float16") if half else scales
        yield name, nibbles(flat, shape, "e2m1", scales, "MXFP4", (f"{name}_blocks", f"{name}_scales"), transposed=True)
