"""The group of every column (`g_idx`): formats that quantize columns by importance store which scale each has."""

from __future__ import annotations

import numpy as np

from ...quantized.matrix import QuantizedMatrix
from ..safetensors_header import StoredTensor
from .codes import sorted_by_group
from .stored import Stored, stored_array


def in_groups(stored: Stored, name: str, tensor: StoredTensor | None, matrix: QuantizedMatrix) -> QuantizedMatrix:
    """The matrix with its columns sorted by the group that the tensor gives each.

    Args:
        stored: for refusals.
        name: of the tensor.
        tensor: int32 `[K]`; None, or all -1: groups are blocks of columns as they lie.
        matrix: with its columns as they are stored.

    Raises:
        InvalidCheckpoint: some group does not have the columns of a block.
    """
    if tensor is None:
        return matrix
    groups = stored_array(tensor)
    blocks = np.arange(matrix.columns) // matrix.block
    if np.array_equal(groups, blocks) or np.all(groups == -1):
        return matrix
    order = np.argsort(groups, kind="stable")
    if not np.array_equal(groups[order], blocks):
        raise stored.value(name, f"does not give each of the {matrix.blocks} groups its {matrix.block} columns")
    return sorted_by_group(matrix, order)
