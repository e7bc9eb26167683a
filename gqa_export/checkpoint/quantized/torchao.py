"""torchao's int8 weights in safetensors: codes a row, a scale a row or group, and zero points that are zero.

Source: `torchao/prototype/safetensors` and `torchao/quantization` of https://github.com/pytorch/ao.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...quantized.matrix import QuantizedMatrix
from .codes import byte_rows, integers, whole_bytes
from .description import Description
from .scales import scales_of
from .stored import E4M3, SCALES, Stored, stored_array


def read_torchao(description: Description, stored: Stored) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Every quantized weight by its name. Layouts that are tiled for a device are left over, and refused as such.

    Raises:
        InvalidCheckpoint: a weight lacks its scales, or they do not fit.
    """
    for stem in stored.modules("weight_qdata"):
        name = f"{stem.removesuffix('_')}weight"
        weight = stored.take(f"{stem}weight_qdata", ("int8", E4M3))
        scale = stored.take(f"{stem}weight_scale", SCALES)
        zero = stored.maybe(f"{stem}weight_zero_point", ("int8", "int32", "int64", *SCALES), scale.shape)
        scales = scales_of(stored, f"{stem}weight_scale", scale, weight.shape)
        names = tuple(each for each in (f"{stem}weight_{part}" for part in ("qdata", "scale", "zero_point"))
                      if each in stored)
        label = f"torchao {'int8' if weight.dtype == 'int8' else 'float8 e4m3'}"
        if zero is None or not np.any(stored_array(zero)):
            yield name, whole_bytes(weight, scales, label, names)
            continue
        if weight.dtype != "int8" or zero.dtype in SCALES:
            raise stored.value(f"{stem}weight_zero_point", f"is {zero.dtype} and not zero")
        read, points = byte_rows(weight), stored_array(zero).astype(np.int16).reshape(scale.shape[0], -1) + 128
        yield name, integers(lambda start, stop, read=read: read(start, stop) ^ np.uint8(128),  # type: ignore[misc]
                             lambda start, stop, points=points: points[start:stop],  # type: ignore[misc]
                             scales, weight.shape, 8, f"{label}, asymmetric", names)
