"""compressed-tensors (LLM Compressor, vLLM): packed integers, plain integers, float8, and four-bit floats.

Source: the compressors of https://github.com/vllm-project/compressed-tensors, `src/compressed_tensors/compressors`.
Codes of packed integers are stored plus 2 ** (bits - 1), and so are their zero points, which are packed along rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import numpy as np

from ...quantized.matrix import QuantizedMatrix
from ...quantized.packed_bits import unpack_bits
from ..safetensors_header import StoredTensor
from .codes import byte_rows, integers, nibbles, whole_bytes
from .config_groups import Groups, blocks_that_fit, groups_of
from .description import Description, whole_number
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
    for module in stored.modules(".weight_packed"):
        name, groups = f"{module}.weight", groups_of(description, module)
        packed = stored.tensors[f"{name}_packed"]
        matrix = _packed(stored, name, _weights(groups)) if packed.dtype == "int32" else _float4(stored, name)
        _refuse_lacking(stored, name, groups, matrix)
        yield name, matrix
    for module in stored.modules(".weight_scale"):
        if stored.is_plain(f"{module}.weight"):
            continue  # the scale is left over
        name, groups = f"{module}.weight", groups_of(description, module)
        matrix = whole(stored, name, _weights(groups))
        _refuse_lacking(stored, name, groups, matrix)
        yield name, matrix


def _weights(groups: Groups) -> list[dict[str, Any]]:
    """How the weights of each group are quantized."""
    return [group["weights"] for group in groups.values()]


def _refuse_lacking(stored: Stored, name: str, groups: Groups, matrix: QuantizedMatrix) -> None:
    """Refuse a weight without a tensor that all the groups it may belong to have."""
    module, which = name.removesuffix(".weight"), " or ".join(groups)
    if matrix.kind == "int" and _all(groups, "weights", lambda of: of.get("symmetric") is False) and \
            f"{name}_zero_point" not in stored:
        raise stored.missing(f"{name}_zero_point", f"weights of {which} have zero points (symmetric: false)")
    if matrix.block < matrix.columns and f"{name}_g_idx" not in stored and _all(
            groups, "weights", lambda of: of.get("actorder") in (True, "group", "dynamic")):
        raise stored.missing(f"{name}_g_idx", f"weights of {which} have columns in groups by their importance "
                             "(actorder: group)")
    four_bits = matrix.kind == "e2m1"
    told = "local" if four_bits else False
    if _all(groups, "input_activations", lambda of: of.get("dynamic", False) == told) and not any(
            f"{module}.{each}" in stored for each in ("input_scale", "input_global_scale")):
        raise stored.missing(f"{module}.input_{'global_' if four_bits else ''}scale", f"inputs of {which} are "
                             f"quantized with a stored scale (dynamic: {str(told).lower()})")


def _all(groups: Groups, part: str, holds: Callable[[dict[str, Any]], bool]) -> bool:
    """Whether this part of every group is there, and this holds of it."""
    return bool(groups) and all(isinstance(group.get(part), dict) and holds(group[part]) for group in groups.values())


def _packed(stored: Stored, name: str, schemes: list[dict[str, Any]]) -> QuantizedMatrix:
    rows, columns = (int(size) for size in stored_array(stored.take(f"{name}_shape", ("int64", "int32"), (2,))))
    packed = stored.take(f"{name}_packed", ("int32",))
    fits = [bits for bits in PACKED if packed.shape == (rows, -(-columns // (32 // bits)))]
    told = [whole_number("num_bits", scheme.get("num_bits")) for scheme in schemes]
    bits = next((each for each in fits if each in told), 0)
    if not bits:
        raise stored.shape(f"{name}_packed", f"which is not a weight of {rows} x {columns} in "
                           f"{' or '.join(dict.fromkeys(map(str, told))) or 'any number of'} bits")
    scale = stored.take(f"{name}_scale", SCALES)
    scales = _scales(stored, f"{name}_scale", scale, (rows, columns), [
        scheme for scheme, each in zip(schemes, told, strict=True) if each == bits])
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


def _scales(stored: Stored, name: str, tensor: StoredTensor, shape: tuple[int, ...],
            schemes: list[dict[str, Any]]) -> Scales:
    """The scales, by the one block size of the description that fits them."""
    fitting = blocks_that_fit(schemes, shape, tensor.shape)
    if not fitting:
        sizes = [f"blocks of {scheme['block_structure']}" if scheme.get("block_structure") else
                 f"group_size {scheme.get('group_size')}" for scheme in schemes]
        raise stored.shape(name, f"which is not that of {' or '.join(dict.fromkeys(sizes))} for a weight {shape}")
    if len(fitting) > 1:
        sizes = [f"{high} x {wide}" for high, wide in fitting]
        raise stored.shape(name, f"which is that of blocks of {' and of '.join(sizes)} alike for a weight {shape}: no "
                           "target of config_groups tells which it has")
    high, wide = fitting[0]
    if prod(tensor.shape) == 1 or high == 1:
        return scales_of(stored, name, tensor, shape, group=wide if wide < shape[-1] else 0)
    return scales_of(stored, name, tensor, shape, rectangle=(high, wide))


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
    scale = stored.take(f"{name}_scale", (E4M3, "uint8", E8M0))
    nv = scale.dtype == E4M3
    scales = scales_of(stored, f"{name}_scale", scale, shape, group=16 if nv else 32)
    whole_scale = stored.number(f"{name}_global_scale") if nv else None
    if nv and whole_scale is None:
        raise stored.missing(f"{name}_global_scale")
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
    scales = _scales(stored, f"{name}_scale", scale, weight.shape, schemes)
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
