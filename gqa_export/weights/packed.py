"""Sources of the packed parts of quantized weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..quantized.packing import Packer
from .source_kinds import PackedSource
from .sources import WeightStore

if TYPE_CHECKING:
    from ..quantized.facts import Form
    from ..quantized.matrix import QuantizedMatrix


def add_packed(store: WeightStore, matrices: Mapping[str, QuantizedMatrix],
               parts: Mapping[str, Mapping[str, tuple[Form, str]]]) -> None:
    """Make the parts of packed weights known to a store. parts: weight -> recipe name -> form and part."""
    for name, wanted in parts.items():
        packers: dict[str, Packer] = {}
        for recipe, (form, part) in wanted.items():
            if recipe in store:
                continue  # a second graph reads the same
            packer = packers.setdefault(form.key, Packer(matrices[name], form))
            store.add(recipe, PackedSource(packer, part))
