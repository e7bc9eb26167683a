"""Olive: codes, scales and zero points a row each, low bits first: the layout of ONNX Runtime's MatMulNBits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...quantized.matrix import QuantizedMatrix
from ...quantized.packed_bits import pack_bits, unpack_bits
from .codes import byte_rows, integers
from .description import Description
from .per_module import settings_of, whole
from .scales import scales_of
from .stored import SCALES, Stored, stored_array


def read_olive(description: Description, stored: Stored) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Every quantized weight by its name.

    Raises:
        InvalidCheckpoint: a weight lacks a tensor, or one does not fit the description.
    """
    for module in stored.modules(".qweight"):
        settings = settings_of(description, module)
        matrix = _matrix(stored, module, whole(settings, "bits") or 4, whole(settings, "group_size") or -1)
        if settings.get("symmetric") is False and f"{module}.qzeros" not in stored:
            raise stored.missing(f"{module}.qzeros", f"{description.file} has zero points (symmetric: false)")
        yield f"{module}.weight", matrix


def _matrix(stored: Stored, module: str, bits: int, group: int) -> QuantizedMatrix:
    packed = stored.take(f"{module}.qweight", ("uint8",))
    if bits not in (2, 4, 8) or len(packed.shape) != 2:
        raise stored.shape(f"{module}.qweight", f"which is not a weight of {bits} bits")
    rows, columns = packed.shape[0], packed.shape[1] * 8 // bits
    scale = stored.take(f"{module}.scales", SCALES)
    scales = scales_of(stored, f"{module}.scales", scale, (rows, columns), group=max(group, 0))
    blocks = -(-columns // scales.block)
    zero = stored.maybe(f"{module}.qzeros", ("uint8",), (rows, -(-blocks * bits // 8)))
    middle = pack_bits(np.full((1, blocks), 1 << bits - 1, np.uint8), bits)
    symmetric = zero is None or bool(np.all(stored_array(zero) == middle))
    read, zeros = byte_rows(packed), None if zero is None or symmetric else byte_rows(zero)
    names = tuple(each for each in (f"{module}.{part}" for part in ("qweight", "scales", "qzeros")) if each in stored)
    label = f"Olive {bits} bits, group {scales.block}{'' if symmetric else ', asymmetric'}"
    return integers(lambda start, stop: unpack_bits(read(start, stop), bits, columns),
                    zeros and (lambda start, stop: unpack_bits(zeros(start, stop), bits, blocks).astype(np.int16)),
                    scales, (rows, columns), bits, label, names, in_place=f"{module}.qweight" if symmetric else "",
                    scales_in_place=f"{module}.scales" if symmetric and scale.dtype == "float16" and scale.shape == (
                        rows, blocks) else "")
