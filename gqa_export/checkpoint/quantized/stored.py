"""The stored tensors of a quantized checkpoint, as a reader takes them: checked, and remembered as taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import numpy as np

from ...errors import InvalidCheckpoint
from ..safetensors_header import StoredTensor

Array = Any
"""a numpy array"""
FIX = ("download the checkpoint again, or quantize the original again; the description and the tensors must belong "
       "together")
E4M3, E8M0 = "float8_e4m3fn", "float8_e8m0fnu"
RAW = {"bfloat16": np.uint16, E4M3: np.uint8, "float8_e5m2": np.uint8, E8M0: np.uint8}
SCALES = ("float16", "bfloat16", "float32", "float64")
Rows = Callable[[int, int], Array]
"""(start, stop) -> some values of these rows"""


class Stored:
    """Tensors by name; which of them readers took; notes of readers for the user."""

    def __init__(self, tensors: dict[str, StoredTensor], where: str) -> None:
        self.tensors, self.where = tensors, where
        self.taken: dict[str, StoredTensor] = {}
        self.notes: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def is_plain(self, name: str) -> bool:
        """Whether this tensor is there with numbers that need no scale."""
        return name in self.tensors and self.tensors[name].dtype in SCALES

    def modules(self, suffix: str) -> list[str]:
        """Whatever stands before `suffix` in the names that end in it and are not taken."""
        return sorted(name.removesuffix(suffix) for name in self.tensors if name.endswith(suffix)
                      and name not in self.taken)

    def take(self, name: str, dtypes: Iterable[str], shape: tuple[int, ...] | None = None) -> StoredTensor:
        """A tensor that a weight consists of.

        Args:
            name: of it.
            dtypes: it may have.
            shape: it must have; None: any.

        Raises:
            InvalidCheckpoint: it is missing, or has another type or shape.
        """
        if name not in self.tensors:
            raise self.missing(name)
        tensor = self.tensors[name]
        if tensor.dtype not in (kinds := tuple(dtypes)):
            raise InvalidCheckpoint(f"{name} is {tensor.dtype}, expected {' or '.join(kinds)}", self.where, FIX,
                                    code="E-CKPT-QUANT-DTYPE")
        if shape is not None and tensor.shape != shape:
            raise self.shape(name, f"expected {shape}")
        self.taken[name] = tensor
        return tensor

    def maybe(self, name: str, dtypes: Iterable[str], shape: tuple[int, ...] | None = None) -> StoredTensor | None:
        """As `take`; None if the tensor is not there."""
        return self.take(name, dtypes, shape) if name in self.tensors else None

    def number(self, name: str) -> float | None:
        """The one value of a tensor of floats, None if the tensor is not there."""
        tensor = self.maybe(name, SCALES)
        if tensor is None:
            return None
        if prod(tensor.shape) != 1:
            raise self.shape(name, "expected one value")
        value = float(floats(tensor).reshape(-1)[0])
        if not np.isfinite(value) or value <= 0:
            raise self.value(name, f"is {value}, expected a finite number above zero")
        return value

    def missing(self, name: str, why: str = "") -> InvalidCheckpoint:
        """The refusal of a weight without a tensor. why: what says that it must be there; "" if every weight has it."""
        return InvalidCheckpoint(f"a quantized weight lacks its tensor {name}{f': {why}' if why else ''}", self.where,
                                 FIX, code="E-CKPT-QUANT-MISSING")

    def shape(self, name: str, expected: str) -> InvalidCheckpoint:
        """The refusal of a tensor's shape."""
        return InvalidCheckpoint(f"{name} has the shape {self.tensors[name].shape}, {expected}", self.where, FIX,
                                 code="E-CKPT-QUANT-SHAPE")

    def value(self, name: str, problem: str) -> InvalidCheckpoint:
        """The refusal of a tensor's values, or of what describes them."""
        return InvalidCheckpoint(f"{name} {problem}", self.where, FIX, code="E-CKPT-QUANT-VALUE")


def stored_array(tensor: StoredTensor) -> Array:
    """The tensor as it is in its file, mapped; types that numpy does not have as unsigned integers."""
    dtype = np.dtype(RAW.get(tensor.dtype, tensor.dtype))
    if not prod(tensor.shape):
        return np.zeros(tensor.shape, dtype)
    try:
        if tensor.offset % dtype.itemsize:  # a mapping must be aligned
            return np.fromfile(tensor.path, dtype, prod(tensor.shape), offset=tensor.offset).reshape(tensor.shape)
        mapped: Any = np.memmap(tensor.path, dtype, "r", tensor.offset, tensor.shape or (1,))
        return mapped.view(np.ndarray).reshape(tensor.shape)
    except ValueError as error:
        raise InvalidCheckpoint("the file became shorter while it was read", str(tensor.path),
                                "export again once nothing else writes to the checkpoint",
                                code="E-WEIGHTS-FILE-CHANGED") from error


def floats(tensor: StoredTensor, part: Any = ...) -> Array:
    """Values of a tensor of floats, of float8 too, as float32 (float64 stays), exactly. part: an index of it."""
    from ...quantized.matrix import LEVELS

    raw = stored_array(tensor)[part]
    if tensor.dtype == "bfloat16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if tensor.dtype == E4M3:
        return LEVELS["e4m3"][raw].astype(np.float32)
    if tensor.dtype in (E8M0, "uint8"):
        powers = np.ldexp(np.float32(1), np.where(raw == 255, 0, raw.astype(np.int32) - 127))
        return np.where(raw == 255, np.float32(np.nan), powers)
    return raw.astype(np.float32)
