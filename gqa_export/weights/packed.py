"""Sources of the packed parts of quantized weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..quantized.packing import Packer
from .source_kinds import PackedSource, StoredSource
from .sources import WeightStore

if TYPE_CHECKING:
    from ..checkpoint.safetensors_header import StoredTensor
    from ..quantized.facts import Form
    from ..quantized.matrix import QuantizedMatrix


def add_packed(store: WeightStore, matrices: Mapping[str, QuantizedMatrix],
               parts: Mapping[str, Mapping[str, tuple[Form, str]]],
               stored: Mapping[str, StoredTensor] | None = None) -> None:
    """Make the parts of packed weights known to a store.

    Args:
        store: that learns them.
        matrices: name of a weight -> what is packed.
        parts: weight -> recipe name -> form and part.
        stored: tensors of the checkpoint that a graph may point at, by name: a part whose bytes one of them is, in the
            layout that the operator reads, is that tensor. None: every part is packed.
    """
    for name, wanted in parts.items():
        packers: dict[str, Packer] = {}
        for recipe, (form, part) in wanted.items():
            if recipe in store:
                continue  # a second graph reads the same
            packer = packers.setdefault(form.key, Packer(matrices[name], form))
            name_of_stored = packer.in_place(part) if stored else ""
            if stored and name_of_stored in stored:
                there = stored[name_of_stored]
                store.add(recipe, StoredSource(replace(there, dtype=packer.dtype(part), shape=packer.shape(part))))
            else:
                store.add(recipe, PackedSource(packer, part))
