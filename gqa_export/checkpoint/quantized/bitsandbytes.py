"""bitsandbytes: nf4 and fp4, with scales that may be quantized themselves, and LLM.int8.

Source: https://github.com/bitsandbytes-foundation/bitsandbytes, `functional.py` (QuantState, dequantize_blockwise) and
`nn/modules.py`. Blocks run through the whole matrix; the first of two elements is in the high nibble.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import gcd, prod
from typing import Any

import numpy as np

from ...quantized.matrix import LEVELS, QuantizedMatrix
from ..refusals import refuse_quantized
from .codes import nibbles, whole_bytes
from .description import Description
from .scales import Scales
from .stored import Stored, floats, stored_array

Array = Any
"""a numpy array"""
STATE = ".quant_state.bitsandbytes__"
STORAGE = ("uint8", "bfloat16", "float16", "float32")
"""types that bytes of codes may be called (`bnb_4bit_quant_storage`)"""
INT8_LAYOUTS = ("row", "col32", "col_turing", "col_ampere")
"""what `weight_format` counts (`LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING` of `utils.py`)"""


def read_bitsandbytes(description: Description, stored: Stored) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Every quantized weight by its name.

    Raises:
        InvalidCheckpoint: a weight lacks a tensor, one does not fit, or its table of numbers is another one.
        UnsupportedModel: bytes are in tiles of a device.
    """
    for kind in ("nf4", "fp4"):
        for name in stored.modules(f"{STATE}{kind}"):
            yield name, _four_bits(stored, name, kind)
    for module in stored.modules(".SCB"):
        name = f"{module}.weight"
        if stored.is_plain(name):
            continue
        weight = stored.take(name, ("int8",))
        scale = stored.take(f"{module}.SCB", ("float32",), weight.shape[:1])
        _refuse_tiled(stored, f"{module}.weight_format")
        values = floats(scale).reshape(-1, 1)
        scales = Scales(lambda start, stop, values=values: values[start:stop], weight.shape[-1])  # type: ignore[misc]
        yield name, whole_bytes(weight, scales, "bitsandbytes int8", (name, f"{module}.SCB"), global_scale=1 / 127)


def _refuse_tiled(stored: Stored, name: str) -> None:
    """Refuse int8 in tiles of a device, which old releases wrote."""
    tensor = stored.maybe(name, ("uint8", "int32", "int64"))
    found = [0] if tensor is None else [int(each) for each in stored_array(tensor).reshape(-1)]
    if len(found) == 1 and found[0] in range(1, len(INT8_LAYOUTS)):
        refuse_quantized(f"bitsandbytes int8, layout {INT8_LAYOUTS[found[0]]}", stored.where)
    if found != [0]:
        raise stored.value(name, f"is {found[:3]}, expected one number of a layout, from 0 (rows) to 3")


def _four_bits(stored: Stored, name: str, kind: str) -> QuantizedMatrix:
    state = _state(stored, f"{name}{STATE}{kind}")
    try:
        shape, block = tuple(int(size) for size in state["shape"]), int(state["blocksize"])
        if state["quant_type"] != kind or len(shape) != 2 or block < 1:
            raise ValueError(f"a {state['quant_type']} of shape {shape} in blocks of {block}")
    except (KeyError, TypeError, ValueError) as error:
        raise stored.value(f"{name}{STATE}{kind}", f"does not describe a weight: {error}") from error
    count = prod(shape)
    blocks = -(-count // block)
    packed = stored.take(name, STORAGE)
    if packed.nbytes * 2 != count or shape[1] % 2:
        raise stored.shape(name, f"which are not {shape} numbers of four bits")
    table = floats_of(stored, f"{name}.quant_map", (16,))
    if not np.array_equal(table, LEVELS[kind].astype(np.float32)):
        raise stored.value(f"{name}.quant_map", f"is not the table of {kind}")
    names = tuple(each for each in (name, f"{name}{STATE}{kind}", *(f"{name}.{part}" for part in (
        "absmax", "quant_map", "nested_absmax", "nested_quant_map"))) if each in stored)
    scale = _absmax(stored, name, state, blocks)
    width = gcd(block, shape[1])  # a block that goes on in the next row: its scale for each part
    per_row = shape[1] // width

    def read(start: int, stop: int) -> Array:
        return scale[np.arange(start * per_row, stop * per_row) * width // block].reshape(stop - start, per_row)

    flat = type(packed)(packed.path, packed.offset, packed.nbytes, "uint8", (shape[0], shape[1] // 2))
    nested = ", scales quantized" if f"{name}.nested_absmax" in stored else ""
    return nibbles(flat, shape, kind, Scales(read, width), f"bitsandbytes {kind}, block {block}{nested}", names,
                   high_first=True, in_place=name)


def _state(stored: Stored, name: str) -> dict[str, Any]:
    try:
        found = json.loads(stored_array(stored.take(name, ("uint8",))).tobytes())
    except ValueError as error:
        raise stored.value(name, f"is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def floats_of(stored: Stored, name: str, shape: tuple[int, ...]) -> Array:
    """The values of a tensor of float32."""
    return floats(stored.take(name, ("float32",), shape))


def _absmax(stored: Stored, name: str, state: dict[str, Any], blocks: int) -> Array:
    """The scale of every block, float32; those that are quantized are computed in float32, as the library does."""
    size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if f"{name}.nested_absmax" not in stored:
        if size is not None:
            raise stored.missing(f"{name}.nested_absmax", "its state has scales that are quantized (nested_blocksize)")
        return floats_of(stored, f"{name}.absmax", (blocks,))
    codes = stored_array(stored.take(f"{name}.absmax", ("uint8",), (blocks,)))
    if not isinstance(size, int) or size < 1 or not isinstance(offset, int | float):
        raise stored.value(f"{name}.nested_absmax", "has neither a block size nor an offset in the weight's state")
    outer = floats_of(stored, f"{name}.nested_absmax", (-(-blocks // size),))
    table = floats_of(stored, f"{name}.nested_quant_map", (256,))
    return table[codes] * np.repeat(outer, size)[:blocks] + np.float32(offset)
