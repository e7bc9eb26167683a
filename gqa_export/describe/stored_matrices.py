"""The matrices of a quantized checkpoint, as they are stored: format, bits and bytes of each. No weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from ..bundle.quantization import LAYER
from ..weights.dtypes import itemsize

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint
    from ..quantized.matrix import QuantizedMatrix


@dataclass(frozen=True)
class StoredMatrix:
    """One weight of two axes or more.

    Attributes:
        name: of the weight, as rules of `--quantize FILE.toml` name it; of a GGUF tensor that is kept as values, the
            file's own.
        stored: the format, "GPTQ 4 bits, group 128", or "bfloat16".
        bits: of a code, or of a floating-point number.
        shape: of the weight.
        bytes: of its codes, scales and whatever else it is made of.
        quantized: whether it is stored as codes.
    """

    name: str
    stored: str
    bits: int
    shape: tuple[int, ...]
    bytes: int
    quantized: bool


def stored_matrices(checkpoint: Checkpoint) -> tuple[StoredMatrix, ...]:
    """Every matrix of a quantized checkpoint by name; () of one whose weights are all floating-point numbers."""
    if not checkpoint.quantized:
        return ()
    found = _of_gguf(checkpoint) if checkpoint.gguf_file is not None else _of_folder(checkpoint)
    return tuple(sorted(found, key=lambda each: each.name))


def _of_folder(checkpoint: Checkpoint) -> Iterator[StoredMatrix]:
    for name, matrix in checkpoint.quantized.items():
        yield _quantized(name, matrix, sum(checkpoint.packed[part].nbytes for part in matrix.tensors))
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.shape) > 1:
            yield StoredMatrix(name, tensor.dtype, 8 * itemsize(tensor.dtype), tensor.shape, tensor.nbytes, False)


def _of_gguf(checkpoint: Checkpoint) -> Iterator[StoredMatrix]:
    """Of a file whose matrices are cut and joined on the way to transformers' names: each has the bytes of its own
    elements."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    from ..checkpoint.gguf_parts import read_gguf

    assert checkpoint.gguf_file is not None
    header = read_gguf(checkpoint.gguf_file)

    def size(tensor: str, elements: int) -> int:
        of_block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(header.tensors[tensor][0])]
        return elements // of_block * nbytes

    taken: set[str] = set()
    for name, matrix in checkpoint.quantized.items():
        taken.update(matrix.tensors)
        yield _quantized(name, matrix, size(matrix.tensors[0], prod(matrix.shape)))
    for name, (kind, shape) in header.tensors.items():
        if len(shape) > 1 and name not in taken:
            of_block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            yield StoredMatrix(name, f"GGUF {GGMLQuantizationType(kind).name}", 8 * nbytes // of_block, shape,
                               size(name, prod(shape)), of_block > 1)


def _quantized(name: str, matrix: QuantizedMatrix, nbytes: int) -> StoredMatrix:
    # a form may be held in more bits than its codes have in the file: IQ4_NL
    bits = min(matrix.bits, 8 * nbytes // max(prod(matrix.shape), 1)) or matrix.bits
    return StoredMatrix(name, matrix.label, bits, matrix.parameter_shape, nbytes, True)


def stored_lines(matrices: tuple[StoredMatrix, ...]) -> list[str]:
    """For people: the whole, then each matrix; layers that are alike in all have one line."""
    quantized = [each for each in matrices if each.quantized]
    plain = [each for each in matrices if not each.quantized]
    total = f"{sum(each.bytes for each in quantized) / 1e6:,.1f} MB in {len(quantized)} quantized matrices"
    lines = ["stored weights: " + total + (
        f", {sum(each.bytes for each in plain) / 1e6:,.1f} MB in {len(plain)} of floating-point numbers" if plain
        else "")]
    groups: dict[tuple[object, ...], list[StoredMatrix]] = {}
    for each in matrices:
        key = (LAYER.sub(".*.", each.name, count=1), each.stored, each.bits, each.shape, each.bytes)
        groups.setdefault(key, []).append(each)
    for (name, *_), members in groups.items():
        first = members[0]
        called = f"{name} ({len(members)} of them)" if len(members) > 1 else first.name
        lines.append(f"  {called}: {first.stored}, {first.bits} bits, {' x '.join(map(str, first.shape))}, "
                     f"{sum(each.bytes for each in members):,} bytes")
    return [*lines, "  what an export makes of each: gqa-export onnx --dry-run"]
