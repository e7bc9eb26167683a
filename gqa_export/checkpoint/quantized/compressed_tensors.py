"""compressed-tensors (LLM Compressor, vLLM): packed integers, plain integers, float8, and four-bit floats.

Source: the compressors of https://github.com/vllm-project/compressed-tensors, `src/compressed_tensors/compressors`.
Codes of packed integers are stored plus 2 ** (bits - 1), and so are their zero points, which are packed along rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ...quantized.matrix import QuantizedMatrix
from ...quantized.packed_bits import unpack_bits
from ..safetensors_header import StoredTensor
from .codes import byte_rows, integers, nibbles, whole_bytes
from .description import Description
from .groups import in_groups
from .scales import Scales, scales_of
from .stored import E4M3, E8M0, SCALES, Rows, Stored, stored_array

Array = Any
"""a numpy array"""
PACKED = (2, 4, 8)
"""bits whose codes fill words of 32 bits"""
KIND = "compressed-tensors"


def read_compressed_tensors(description: Description, stored: Stored) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Every quantized weight by its name.

    Raises:
        InvalidCheckpoint: a weight lacks a tensor, or one does not fit the description.
    """
    schemes = _schemes(description)
    for module in stored.modules(".weight_packed"):
        name = f"{module}.weight"
        packed = stored.tensors[f"{name}_packed"]
        yield name, _packed(stored, name, schemes) if packed.dtype == "int32" else _float4(stored, name)
    for module in stored.modules(".weight_scale"):
        if stored.is_plain(f"{module}.weight"):
            continue  # the scale is left over
        yield f"{module}.weight", whole(stored, f"{module}.weight", schemes)


def _schemes(description: Description) -> list[dict[str, Any]]:
    """How the weights of each group of layers are quantized."""
    groups = description.fields.get("config_groups")
    found = [group.get("weights") for group in groups.values() if isinstance(group, dict)] if isinstance(
        groups, dict) else []
    return [scheme for scheme in found if isinstance(scheme, dict)]


def _packed(stored: Stored, name: str, schemes: list[dict[str, Any]]) -> QuantizedMatrix:
    rows, columns = (int(size) for size in stored_array(stored.take(f"{name}_shape", ("int64", "int32"), (2,))))
    packed = stored.take(f"{name}_packed", ("int32",))
    fits = [bits for bits in PACKED if packed.shape == (rows, -(-columns // (32 // bits)))]
    told = [int(scheme.get("num_bits") or 0) for scheme in schemes]
    bits = next((each for each in fits if each in told), 0)
    if not bits:
        raise stored.shape(f"{name}_packed", f"which is not a weight of {rows} x {columns} in "
                           f"{' or '.join(map(str, sorted(set(told)))) or 'any number of'} bits")
    scale = stored.take(f"{name}_scale", SCALES)
    groups = {int(scheme.get("group_size") or -1) for scheme in schemes if int(scheme.get("num_bits") or 0) == bits}
    scales = _grouped(stored, f"{name}_scale", scale, (rows, columns), groups)
    blocks = -(-columns // scales.block)
    zero = stored.maybe(f"{name}_zero_point", ("int32",), (-(-rows // (32 // bits)), blocks))
    group_of = stored.maybe(f"{name}_g_idx", ("int32", "int64"), (columns,))
    read = byte_rows(packed)
    direct = zero is None and columns % (32 // bits) == 0
    names = tuple(each for each in (f"{name}_packed", f"{name}_scale", f"{name}_zero_point", f"{name}_g_idx",
                                    f"{name}_shape") if each in stored)
    matrix = integers(lambda start, stop: unpack_bits(read(start, stop), bits, columns),
                      None if zero is None else _along_rows(zero, bits), scales, (rows, columns), bits,
                      f"{KIND} int{bits}, {_size(scales, columns)}{', asymmetric' if zero else ''}", names,
                      in_place=f"{name}_packed" if direct else "",
                      scales_in_place=f"{name}_scale" if direct and scale.dtype == "float16" and scale.shape == (
                          rows, blocks) else "", input_scale=_input(stored, name))
    return in_groups(stored, f"{name}_g_idx", group_of, matrix)


def _grouped(stored: Stored, name: str, tensor: StoredTensor, shape: tuple[int, int], groups: set[int]) -> Scales:
    """The scales, by the group size of the description that fits them."""
    fitting = [group for group in groups if group > 0 and tensor.shape == (shape[0], -(-shape[1] // group))]
    if not fitting and not groups & {-1, 0}:
        raise stored.shape(name, f"which are not scales of groups of {' or '.join(map(str, sorted(groups)))} columns")
    return scales_of(stored, name, tensor, shape, group=fitting[0] if fitting else 0)


def _along_rows(tensor: StoredTensor, bits: int) -> Rows:
    """Zero points that are packed along the rows of the weight."""
    each = 32 // bits

    def read(start: int, stop: int) -> Array:
        words = stored_array(tensor)[start // each : -(-stop // each)].view(np.uint32)
        shifts = (np.arange(each, dtype=np.uint32) * np.uint32(bits))[None, :, None]
        found = (words[:, None, :] >> shifts & np.uint32((1 << bits) - 1)).reshape(len(words) * each, words.shape[1])
        return found[start % each : start % each + stop - start].astype(np.int16)

    return read


def _float4(stored: Stored, name: str) -> QuantizedMatrix:
    """nvfp4 and mxfp4. The global scale divides."""
    packed = stored.take(f"{name}_packed", ("uint8",))
    shape = (*packed.shape[:-1], packed.shape[-1] * 2)
    nv = f"{name}_global_scale" in stored
    scale = stored.take(f"{name}_scale", (E4M3,) if nv else ("uint8", E8M0))
    scales = scales_of(stored, f"{name}_scale", scale, shape, group=16 if nv else 32)
    whole_scale = stored.number(f"{name}_global_scale")
    names = tuple(each for each in (f"{name}_packed", f"{name}_scale", f"{name}_global_scale") if each in stored)
    module = name.removesuffix(".weight")
    input_scale = stored.number(f"{module}.input_global_scale")
    return nibbles(packed, shape, "e2m1", scales, f"{KIND} {'nvfp4' if nv else 'mxfp4'}", names,
                   global_scale=1.0 / whole_scale if whole_scale else 1.0,
                   input_scale=1.0 / input_scale if input_scale else None)


def whole(stored: Stored, name: str, schemes: list[dict[str, Any]]) -> QuantizedMatrix:
    """A weight of one byte an element beside its `weight_scale`: float8 or int8."""
    weight = stored.take(name, (E4M3, "int8"))
    scale = stored.take(f"{name}_scale", SCALES)
    rectangle = next((tuple(scheme["block_structure"]) for scheme in schemes if isinstance(
        scheme.get("block_structure"), list)), None)
    groups = {int(scheme.get("group_size") or -1) for scheme in schemes} or {-1}
    scales = scales_of(stored, f"{name}_scale", scale, weight.shape, rectangle=rectangle) if rectangle else _grouped(
        stored, f"{name}_scale", scale, weight.shape, groups)  # type: ignore[arg-type]
    names = tuple(each for each in (name, f"{name}_scale", f"{name}_zero_point") if each in stored)
    label = f"{KIND} {'float8 e4m3' if weight.dtype == E4M3 else 'int8'}, {_size(scales, weight.shape[-1])}"
    input_scale, zero = _input(stored, name), _zeros(stored, name, weight, scale)
    if zero is None:
        return whole_bytes(weight, scales, label, names, input_scale=input_scale)
    read, zeros = byte_rows(weight), zero
    return integers(lambda start, stop: read(start, stop) ^ np.uint8(128),
                    lambda start, stop: np.broadcast_to(zeros[start if len(zeros) > 1 else 0 : stop if len(
                        zeros) > 1 else 1], (stop - start, zeros.shape[1])), scales, weight.shape, 8,
                    f"{label}, asymmetric", names, input_scale=input_scale)


def _zeros(stored: Stored, name: str, weight: StoredTensor, scale: StoredTensor) -> Array | None:
    """Zero points of signed bytes plus 128; None where all are zero, which is symmetric."""
    tensor = stored.maybe(f"{name}_zero_point", ("int8", E4M3), scale.shape)
    raw = None if tensor is None else stored_array(tensor)
    if raw is None or not np.any(raw & 127 if tensor and tensor.dtype == E4M3 else raw):
        return None
    if weight.dtype != "int8" or raw.dtype != np.int8:
        raise stored.value(f"{name}_zero_point", f"is not zero beside a weight of {weight.dtype}")
    return raw.astype(np.int16).reshape(-1, raw.shape[-1] if raw.ndim > 1 else 1) + 128


def _input(stored: Stored, name: str) -> float | None:
    """The static scale of a layer's input, if it has one for all."""
    module = name.removesuffix(".weight")
    zero = stored.maybe(f"{module}.input_zero_point", ("int8", E4M3))
    if zero is not None and np.any(stored_array(zero)):
        raise stored.value(f"{module}.input_zero_point", "is not zero: activations are quantized symmetrically only")
    return stored.number(f"{module}.input_scale")


def _size(scales: Scales, columns: int) -> str:
    if scales.row_block > 1:
        return f"blocks {scales.row_block} x {scales.block}" if scales.block < columns else "one scale"
    return f"group {scales.block}" if scales.block < columns else "a scale a row"
