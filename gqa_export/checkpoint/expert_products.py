"""Where PyTorch multiplies by an expert's matrix: which expert it is, and which of the two factors is its input.

Models reach experts in several ways: `bmm` with those that `weight[ids]` picks, `linear` with `weight[number]` in a
loop, `bmm` with all. What is picked from a stacked parameter carries where it comes from until it is multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

MARK = "gqa_picked"
"""attribute of a tensor that was picked from a stack"""
PRODUCTS = {torch.bmm, torch.mm, torch.matmul, torch.Tensor.bmm, torch.Tensor.mm, torch.Tensor.matmul,
            torch.Tensor.__matmul__, torch.nn.functional.linear}


@dataclass(frozen=True, eq=False)
class Picked:
    """Experts of a stack.

    Attributes:
        owner: id of the stacked parameter.
        index: which of them; None: all.
    """

    owner: int
    index: Any = None


@dataclass(frozen=True, eq=False)
class ExpertFactor:
    """The factors of a product with experts. place: of the input among the arguments. axis: of the input, that is
    summed over."""

    picked: Picked
    place: int
    axis: int


def picked_from(tensor: Any, owners: Any) -> Picked | None:
    """Which experts a tensor is, if it is a parameter in `owners` (ids) or was picked from one."""
    if id(tensor) in owners:
        return Picked(id(tensor))
    return getattr(tensor, MARK, None) if isinstance(tensor, torch.Tensor) else None


def follow(func: Any, args: Any, result: Any, owners: Any) -> None:
    """Let what a function picks from a stack, or makes of what was picked, carry where it comes from: whatever has as
    many numbers is the same matrices, in other axes (`w.T`, `w.view`) or of another type (`w.float()`)."""
    picked = picked_from(args[0], owners) if args else None
    if picked is None or not isinstance(result, torch.Tensor) or func in PRODUCTS:
        return
    if func is torch.Tensor.__getitem__ and picked.index is None:
        setattr(result, MARK, Picked(picked.owner, args[1]))
    elif result is not args[0] and result.is_floating_point() and result.numel() == args[0].numel():
        setattr(result, MARK, picked)


def factor_of(func: Any, args: Any, owners: Any) -> ExpertFactor | None:
    """The input of a product with experts; None for another function."""
    if func not in PRODUCTS or len(args) < 2:
        return None
    for place, axis in ((1, -1), (0, -2)):
        picked = picked_from(args[place], owners)
        if picked is not None:
            return ExpertFactor(picked, 1 - place, axis)
    return None
