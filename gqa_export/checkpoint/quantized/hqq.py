"""HQQ with groups along K (axis 1): value = (code - zero) * scale, where zero is any number.

Groups lie one below the other, `[N * K / group, group]`. Packing takes the first half of those rows for the high
nibble, the second for the low one. The product of zero and scale is exact in float32 where both have 16 bits, and
rounded once where they do not. Source: https://github.com/dropbox/hqq, `hqq/core/bitpack.py` and `quantize.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

from ...quantized.matrix import QuantizedMatrix, Stripe
from ..refusals import refuse_quantized
from .description import Description
from .stored import SCALES, Stored, floats, stored_array

Array = Any
"""a numpy array"""
PARTS = {8: 1, 4: 2, 2: 4}
"""bits -> codes of a byte"""
SETTINGS = ("nbits", "group_size", "axis", "packing", "channel_wise", "optimize", "round_zero", "view_as_float",
            "unpack_view_dtype", "compute_dtype", "quant_scale", "quant_zero", "offload_meta", "stores_quant_config",
            "encoded_state_dict")
"""tensors that repeat a module's settings"""


def read_hqq(description: Description, stored: Stored) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Every quantized weight by its name.

    Raises:
        InvalidCheckpoint: a weight lacks a tensor, or one does not fit.
        UnsupportedModel: groups run along N, or codes do not fill bytes.
    """
    inner = description.fields.get("quant_config")
    inner = inner if isinstance(inner, dict) else description.fields
    settings = inner.get("weight_quant_params", inner)
    bits, axis = settings.get("nbits"), settings.get("axis")
    for module in stored.modules(".W_q"):
        if bits not in PARTS or axis != 1 or settings.get("view_as_float"):
            refuse_quantized(f"HQQ, {bits} bits along axis {axis}", stored.where)
        yield f"{module}.weight", _matrix(stored, module, int(bits), settings.get("group_size"))


def _compare(stored: Stored, module: str, bits: int, group: object) -> None:
    """Take the settings that a module repeats, and refuse one that is not the description's."""
    told: dict[str, object] = {"nbits": bits, "axis": 1, "view_as_float": 0, "quant_scale": 0, "quant_zero": 0,
                               "packing": f"{bits}bit_u8"}
    if isinstance(group, int) and group > 0:
        told["group_size"] = group
    for name in (f"{module}.{each}" for each in SETTINGS):
        if name not in stored:
            continue
        tensor = stored.tensors[name]
        stored.taken[name] = tensor
        if (setting := name.rpartition(".")[2]) in told:
            values = stored_array(tensor).reshape(-1)
            found: object = bytes(values.astype(np.uint8)).decode("ascii", "replace") if setting == "packing" else (
                float(values[0]) if len(values) == 1 else None)
            if found != told[setting]:
                raise stored.value(name, f"is {found}, and the description has {told[setting]}")


def _matrix(stored: Stored, module: str, bits: int, told: object) -> QuantizedMatrix:
    packed = stored.take(f"{module}.W_q", ("uint8",))
    size = stored.take(f"{module}.shape", ("int64", "int32"), (2,))
    rows, columns = (int(each) for each in stored_array(size))
    _compare(stored, module, bits, told)
    group = told if isinstance(told, int) and told > 0 else columns
    parts = PARTS[bits]
    count = rows * columns // group
    if columns % group or packed.shape != (-(-count // parts), group):
        raise stored.shape(f"{module}.W_q", f"which is not a weight of {rows} x {columns} in groups of {group}")
    scale = stored.take(f"{module}.scale", SCALES[:3])
    zero = stored.take(f"{module}.zero", SCALES[:3])
    for name, tensor in (("scale", scale), ("zero", zero)):
        if prod(tensor.shape) != count:
            raise stored.shape(f"{module}.{name}", f"expected {count} values")
    per_row, stride = columns // group, packed.shape[0]

    def read(start: int, stop: int) -> Stripe:
        lines = np.arange(start * per_row, stop * per_row)
        shift = (8 - bits * (lines // stride + 1)).astype(np.uint8) if parts > 1 else np.zeros(len(lines), np.uint8)
        codes = stored_array(packed)[lines % stride] >> shift[:, None] & np.uint8((1 << bits) - 1)
        factor, middle = (floats(each).reshape(-1, per_row)[start:stop] for each in (scale, zero))
        return Stripe(codes.reshape(stop - start, columns), factor, minimum=-(factor * middle))

    names = tuple(f"{module}.{part}" for part in ("W_q", "scale", "zero", "shape"))
    return QuantizedMatrix((rows, columns), bits, group, "int", "minimum", f"HQQ {bits} bits, group {group}", read,
                           tensors=names)
