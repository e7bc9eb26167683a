"""Sources of the packed parts of quantized weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..checkpoint.quantized.stored import floats
from ..quantized.experts import expert_of, matrix_named
from ..quantized.facts import SEPARATOR
from ..quantized.packing import Packer
from .source_kinds import PackedSource, StoredSource
from .sources import WeightStore

if TYPE_CHECKING:
    from ..checkpoint.safetensors_header import StoredTensor
    from ..quantized.facts import Form
    from ..quantized.matrix import QuantizedMatrix

Parts = Mapping[str, tuple["Form", str]]
"""recipe name -> form and part"""


def packers_of(matrix: QuantizedMatrix, parts: Parts) -> Iterator[tuple[str, Packer, str]]:
    """Recipe name, packer and part of all parts of a weight. Parts of one matrix (of one expert) have one packer."""
    packers: dict[tuple[str, str], Packer] = {}
    for recipe, (form, part) in parts.items():
        name = recipe.partition(SEPARATOR)[0]
        key = (name if expert_of(name)[2] else "", form.key)
        if key not in packers:
            packers[key] = Packer(matrix_named(name, matrix), form)
        yield recipe, packers[key], part


def add_packed(store: WeightStore, matrices: Mapping[str, QuantizedMatrix], parts: Mapping[str, Parts],
               stored: Mapping[str, StoredTensor] | None = None) -> None:
    """Make the parts of packed weights known to a store.

    Args:
        store: that learns them.
        matrices: name of a weight -> what is packed.
        parts: weight -> recipe name -> form and part.
        stored: tensors of the checkpoint that a graph may point at, by name: a part whose bytes one of them is, in the
            layout that the operator reads, is that tensor. None: every part is packed.

    Raises:
        InvalidCheckpoint: scales that a graph would point at are NaN or infinite.
    """
    for name, wanted in parts.items():
        missing = {recipe: part for recipe, part in wanted.items() if recipe not in store}
        # a second graph reads the same
        for recipe, packer, part in packers_of(matrices[name], missing) if missing else ():
            there = stored.get(packer.in_place(part)) if stored else None
            if there is not None and part == "scale":  # no stripe of the matrix is read for it
                packer.matrix.refuse_not_finite(part, floats(there).reshape(packer.matrix.rows, -1))
            store.add(recipe, PackedSource(packer, part) if there is None else StoredSource(
                replace(there, dtype=packer.dtype(part), shape=packer.shape(part))))
