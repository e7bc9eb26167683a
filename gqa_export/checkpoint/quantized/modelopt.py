"""NVIDIA ModelOpt: NVFP4, MXFP4, FP8, INT4 with AWQ's smoothing, INT8. What a weight is, its tensors say.

Source: `modelopt/torch/export/quant_utils.py` of https://github.com/NVIDIA/TensorRT-Model-Optimizer. Scales multiply.
Where layers have several algorithms (MIXED_PRECISION), `quantized_layers` lists them by the name of the module.
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
from .per_module import settings_of
from .scales import scales_of
from .stored import E4M3, E8M0, SCALES, Stored, floats, stored_array

Array = Any
"""a numpy array"""
NVFP4_INPUTS = ("nvfp4", "nvfp4_awq", "modelopt_fp4")
"""algorithms, and a method that names one, whose inputs have codes of FP4; others give weights of FP4 inputs of FP8
(W4A8) or none, or do not tell, as MIXED_PRECISION of a layer that it does not list"""


def read_modelopt(description: Description, stored: Stored) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Every quantized weight by its name.

    Raises:
        InvalidCheckpoint: a weight lacks a tensor, or one does not fit.
        UnsupportedModel: a weight is stored in a way that is not read (W4A8).
    """
    for module in stored.modules(".weight_scale"):
        name = f"{module}.weight"
        if stored.is_plain(name):
            continue
        weight = stored.take(name, (E4M3, "uint8", "int8"))
        scale = stored.take(f"{name}_scale", (*SCALES, E4M3, "uint8", E8M0))
        smooth = stored.maybe(f"{module}.pre_quant_scale", SCALES)
        scale_of_inputs = stored.number(f"{module}.input_scale")
        algorithm, group = _of_layer(description, module)
        if settings_of(description, module).get("has_zero_point"):
            raise stored.missing(f"{name}_zero_point", f"{description.file} has zero points (has_zero_point: true)")
        four_bits = weight.dtype == "uint8" and scale.dtype not in SCALES
        # beside codes of FP4 it may be one of FP8, which is six times as large
        more: dict[str, Any] = {"input_scale": scale_of_inputs if not four_bits or algorithm in NVFP4_INPUTS else None}
        columns = weight.shape[-1] * (2 if four_bits else 1)
        if smooth is not None:
            if smooth.shape != (columns,):
                raise stored.shape(f"{module}.pre_quant_scale", f"expected {(columns,)}")
            more["column_scale"] = floats(smooth)
        names = tuple(each for each in (name, f"{name}_scale", f"{name}_scale_2", f"{module}.pre_quant_scale",
                                        f"{module}.input_scale") if each in stored)
        yield name, _matrix(stored, name, weight, scale, group, names, more)


def _of_layer(description: Description, module: str) -> tuple[str, int]:
    """The algorithm in lower case and the group size of a module: its own, or those of a module around it, where
    several are mixed; 0: not told."""
    layers = description.fields.get("quantized_layers")
    if isinstance(layers, dict):  # the group size of the whole would be that of other layers
        around = [name for name, entry in layers.items()
                  if isinstance(entry, dict) and f"{module}.".startswith(f"{name}.")]
        entry = layers[max(around, key=len)] if around else {}
        size = entry.get("group_size")
        return str(entry.get("quant_algo")).lower(), size if isinstance(size, int) and size > 0 else 0
    return description.text("quant_algo", "quant_method"), \
        description.number("group_size", default=0) or _nested_group(description)


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
