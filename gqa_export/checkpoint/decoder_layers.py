"""Where the decoder layers of a module tree are: in a ModuleList with one item a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def layer_lists(model: torch.nn.Module, count: int | None) -> Iterator[tuple[str, torch.nn.ModuleList]]:
    """Every list of modules that may be the decoder's layers, outer ones first.

    Args:
        model: any module tree.
        count: number of layers; nothing is found for 0, lists of any length for None.

    Returns:
        Dotted name and ModuleList of each that has so many items.
    """
    import torch

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and (len(module) if count is None else count) == len(module) > 0:
            yield name, module
