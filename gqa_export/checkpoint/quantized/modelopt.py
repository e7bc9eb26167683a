"""NVIDIA ModelOpt: NVFP4, MXFP4, FP8, INT4 with AWQ's smoothing, INT8. What a weight is, its tensors say.

Source: `modelopt/torch/export/quant_utils.py` of https://github.com/NVIDIA/TensorRT-Model-Optimizer. Scales multiply.
Four-bit integers are packed along N, two's complement, the even row in the low nibble.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ...quantized.matrix import QuantizedMatrix, Stripe
from ..refusals import refuse_quantized
from ..safetensors_header import StoredTensor
from .codes import nibbles, whole_bytes
from .description import Description
from .scales import scales_of
from .stored import E4M3, E8M0, SCALES, Stored, floats, stored_array

Array = Any
"""a numpy array"""


def read_modelopt(description: Description, stored: Stored) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Every quantized weight by its name.

    Raises:
        InvalidCheckpoint: a weight lacks a tensor, or one does not fit.
        UnsupportedModel: a weight is stored in a way that is not read (W4A8).
    """
    group = description.number("group_size", default=0) or _nested_group(description)
    for module in stored.modules(".weight_scale"):
        name = f"{module}.weight"
        if stored.is_plain(name):
            continue
        weight = stored.take(name, (E4M3, "uint8", "int8"))
        scale = stored.take(f"{name}_scale", (*SCALES, E4M3, "uint8", E8M0))
        smooth = stored.maybe(f"{module}.pre_quant_scale", SCALES)
        scale_of_inputs = stored.number(f"{module}.input_scale")
        other = "w4a8" in _algorithm(description, module)  # the scale is one of FP8 then, beside codes of FP4
        more: dict[str, Any] = {"input_scale": None if other else scale_of_inputs}
        columns = weight.shape[-1] * (2 if weight.dtype == "uint8" and scale.dtype not in SCALES else 1)
        if smooth is not None:
            if smooth.shape != (columns,):
                raise stored.shape(f"{module}.pre_quant_scale", f"expected {(columns,)}")
            more["column_scale"] = floats(smooth)
        names = tuple(each for each in (name, f"{name}_scale", f"{name}_scale_2", f"{module}.pre_quant_scale",
                                        f"{module}.input_scale") if each in stored)
        yield name, _matrix(stored, name, weight, scale, group, names, more)


def _algorithm(description: Description, module: str) -> str:
    """What a module is quantized by, in lower case: its own entry, or that of a module around it, or of all."""
    layers = description.fields.get("quantized_layers")
    own = [(name, entry["quant_algo"]) for name, entry in layers.items() if isinstance(entry, dict) and isinstance(
        entry.get("quant_algo"), str) and f"{module}.".startswith(f"{name}.")] if isinstance(layers, dict) else []
    return max(own)[1].lower() if own else description.text("quant_algo")


def _nested_group(description: Description) -> int:
    """The group size of an entry written as compressed-tensors writes them."""
    groups = description.fields.get("config_groups")
    for entry in groups.values() if isinstance(groups, dict) else ():
        weights = entry.get("weights") if isinstance(entry, dict) else None
        if isinstance(weights, dict) and isinstance(weights.get("group_size"), int):
            return int(weights["group_size"])
    return 0


def _matrix(stored: Stored, name: str, weight: StoredTensor, scale: StoredTensor, group: int,
            names: tuple[str, ...], more: dict[str, Any]) -> QuantizedMatrix:
    if weight.dtype == E4M3 or weight.dtype == "int8":
        rectangle = None
        if len(scale.shape) >= 2 and scale.shape not in ((weight.shape[0], 1), (1, 1)):
            size = group if group > 0 else 128
            rectangle = (size, size)
        scales = scales_of(stored, f"{name}_scale", scale, weight.shape, rectangle=rectangle)
        return whole_bytes(weight, scales, f"ModelOpt {'FP8 e4m3' if weight.dtype == E4M3 else 'INT8'}", names, **more)
    if scale.dtype not in SCALES:
        nv = scale.dtype == E4M3
        shape = (*weight.shape[:-1], weight.shape[-1] * 2)
        scales = scales_of(stored, f"{name}_scale", scale, shape, group=group or (16 if nv else 32))
        second = stored.number(f"{name}_scale_2")
        if nv and second is None:
            stored.take(f"{name}_scale_2", SCALES)
        return nibbles(weight, shape, "e2m1", scales, f"ModelOpt {'NVFP4' if nv else 'MXFP4'}", names,
                       global_scale=second or 1.0, **more)
    if f"{name}_scale_2" in stored:
        refuse_quantized("ModelOpt W4A8, 4-bit integers under scales of FP8", stored.where)
    return _int4(stored, name, weight, scale, group, names, more)


def _int4(stored: Stored, name: str, weight: StoredTensor, scale: StoredTensor, group: int, names: tuple[str, ...],
          more: dict[str, Any]) -> QuantizedMatrix:
    shape = (*weight.shape[:-2], weight.shape[-2] * 2, weight.shape[-1])
    scales = scales_of(stored, f"{name}_scale", scale, shape, group=group)

    def read(start: int, stop: int) -> Stripe:
        pairs = stored_array(weight).reshape(-1, weight.shape[-1])[start // 2 : -(-stop // 2)]
        both = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(len(pairs) * 2, weight.shape[-1])
        codes: Array = both[start % 2 : start % 2 + stop - start].astype(np.int8)
        return Stripe(((codes ^ np.int8(8)) - np.int8(8)).astype(np.int8), scales.read(start, stop))

    return QuantizedMatrix(shape, 4, scales.block, "int", "none", f"ModelOpt INT4, group {scales.block}", read,
                           row_block=scales.row_block, scale_dtype=scales.dtype, tensors=names, **more)
