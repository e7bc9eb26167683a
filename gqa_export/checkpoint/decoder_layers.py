"""Where the decoder layers of a module tree are: in a ModuleList with one item a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def layer_lists(model: torch.nn.Module, count: int | None) -> Iterator[tuple[str, torch.nn.ModuleList]]:
    """Every list of modules that may be the decoder's layers. None of them is inside an item of another list: the two
    attentions of a layer of LongCat-Flash are no layers, though a model of one layer has two of them.

    Args:
        model: any module tree.
        count: number of layers; nothing is found for 0, lists of any length for None.

    Returns:
        Dotted name and ModuleList of each that has so many items.
    """
    import torch

    outer = ""
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or (outer and name.startswith(outer)):
            continue
        outer = f"{name}."  # what is inside comes next
        if (len(module) if count is None else count) == len(module) > 0:
            yield name, module
