"""What one weight has, all of its kind have: a tensor that one of them lacks was lost, and what it said with it.

Readers take some tensors where they are there. Without them a weight has other values, which nothing downstream can
see: the export is compared with the same values. Weights that a description tells apart need not have the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ...quantized.matrix import QuantizedMatrix
from .description import Description
from .per_module import role, told_apart
from .stored import Stored


class _Part(NamedTuple):
    """A tensor that readers take if it is there.

    Attributes:
        tails: what follows a module's name.
        has: whether it says something of a weight. One that says nothing (groups as they lie, zero points in the
            middle) may be missing from others.
        differs: a weight's kind, further: those of other kinds need not have it. ModelOpt folds the smoothing of one
            input into the norm before it, and leaves it at others.
    """

    tails: tuple[str, ...]
    has: Callable[[QuantizedMatrix], bool]
    differs: Callable[[str], str] = lambda module: ""


def _outside_layers(module: str) -> str:
    """The head and the embedding need not have the inputs of layers."""
    return "" if role(module) != module and "#" in role(module) else module


PARTS = (
    _Part((".g_idx", ".weight_g_idx"), lambda matrix: matrix.column_order is not None),
    _Part((".qzeros", ".weight_zero_point", "._weight_zero_point"), lambda matrix: matrix.offset == "zero"),
    _Part((".pre_quant_scale",), lambda matrix: matrix.column_scale is not None, role),
    _Part((".input_scale", ".input_global_scale", ".activation_scale"), lambda matrix: matrix.input_scale is not None,
          _outside_layers))


def refuse_incomplete(description: Description, stored: Stored, matrices: dict[str, QuantizedMatrix]) -> None:
    """Refuse a weight without a tensor that others of its kind have.

    Args:
        description: the quantization's.
        stored: the tensors that readers took.
        matrices: quantized weights by name.

    Raises:
        InvalidCheckpoint: names the tensor, and the one that is there.
    """
    says = {name: told_apart(description, _module(name)) for name in matrices}
    for part in PARTS:
        having: dict[tuple[str, int, str, str], str] = {}
        kinds = {name: (matrix.kind, matrix.bits, says[name], part.differs(_module(name)))
                 for name, matrix in matrices.items()}
        for name, matrix in matrices.items():
            if part.has(matrix):
                having.setdefault(kinds[name], name)
        for name, matrix in matrices.items():
            other = having.get(kinds[name])
            if other is None or part.has(matrix) or (part is PARTS[0] and matrix.block >= matrix.columns):
                continue
            tails = [tail for tail in part.tails if f"{_module(other)}{tail}" in stored.taken]
            if tails and not any(f"{_module(name)}{tail}" in stored for tail in part.tails):
                raise stored.missing(f"{_module(name)}{tails[0]}", f"{_module(other)}{tails[0]} is there, and "
                                     f"{description.file} does not tell the two weights apart")


def _module(name: str) -> str:
    return name.removesuffix(".weight")
