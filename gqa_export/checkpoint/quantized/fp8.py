"""FP8 as DeepSeek and Qwen publish it: e4m3 with a scale for each block of 128 x 128, and one or a row for FBGEMM."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...quantized.matrix import QuantizedMatrix
from .codes import whole_bytes
from .description import Description
from .scales import scales_of
from .stored import E4M3, E8M0, SCALES, Stored, floats

INVERSE = "_scale_inv"
"""what follows the name of a weight; the scale multiplies, whatever it is called"""


def read_fp8(description: Description, stored: Stored) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Every quantized weight by its name. Scales may be powers of two, stored as their exponents.

    Raises:
        InvalidCheckpoint: a weight lacks its scales, they do not fit its blocks, or one is not a number.
    """
    size = description.fields.get("weight_block_size")
    rectangle = (int(size[0]), int(size[1])) if isinstance(size, list) and len(size) == 2 else None
    for name in stored.modules(INVERSE):
        if stored.is_plain(name):
            continue
        weight = stored.take(name, (E4M3,))
        scale = stored.take(f"{name}{INVERSE}", (*SCALES, "uint8", E8M0))
        if scale.dtype in ("uint8", E8M0) and not np.isfinite(floats(scale)).all():
            raise stored.value(f"{name}{INVERSE}", "has the exponent 255, which is not a number")
        scales = scales_of(stored, f"{name}{INVERSE}", scale, weight.shape, rectangle=rectangle)
        size_label = f"blocks {rectangle[0]} x {rectangle[1]}" if rectangle else "one scale"
        module = name.removesuffix(".weight")
        static = stored.number(f"{module}.activation_scale") or stored.number(f"{module}.input_scale")
        if static is None and module != name and description.text("activation_scheme") == "static":
            raise stored.missing(f"{module}.activation_scale", f"{description.file} has inputs quantized with a stored "
                                 "scale (activation_scheme: static)")
        yield name, whole_bytes(weight, scales, f"FP8 e4m3, {size_label}", (name, f"{name}{INVERSE}"),
                                input_scale=static)


def read_fbgemm(description: Description, stored: Stored) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Every quantized weight by its name, of e4m3 with a scale a row.

    Raises:
        InvalidCheckpoint: a weight lacks its scales, or they do not fit.
    """
    for module in stored.modules(".weight_scale"):
        name = f"{module}.weight"
        if stored.is_plain(name):
            continue
        weight = stored.take(name, (E4M3,))
        scale = stored.take(f"{name}_scale", SCALES)
        stored.maybe(f"{module}.input_scale_ub", SCALES)  # an upper bound of what is measured as the model runs
        scales = scales_of(stored, f"{name}_scale", scale, weight.shape)
        yield name, whole_bytes(weight, scales, "FBGEMM FP8 e4m3, a scale a row", (name, f"{name}_scale"))
