"""A model that computes in fp64 while its matrices stay as they are stored: a reference without a second copy of them.

Every matrix of the model is shared with the model that it was made from, and each use of it takes its values in fp64,
a block of rows at a time; so the result is that of a model whose weights were cast, to the last bit of each product.
A decode step costs no more than with weights in fp64, which are twice as many bytes to read.

Dimensions: N rows (outputs) and K columns of a matrix.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

SMALLEST = 1 << 14
"""elements below which a parameter is cast for good: norms, biases and convolutions"""
BLOCK = 1 << 20
"""elements of a matrix that are cast at once: 8 MiB of fp64, which a processor's cache holds"""
VIEWS = frozenset((
    "__getitem__", "chunk", "contiguous", "detach", "expand", "expand_as", "flatten", "index_select", "movedim", "mT",
    "narrow", "permute", "requires_grad_", "reshape", "select", "split", "squeeze", "swapaxes", "swapdims", "t", "T",
    "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as"))
"""functions, methods and properties that move values and compute nothing: what they give is stored as it was"""
FACTS = frozenset((
    "__len__", "data_ptr", "dim", "get_device", "is_contiguous", "is_floating_point", "is_complex", "ndimension",
    "nelement", "numel", "size", "storage_offset", "stride", "untyped_storage"))
"""methods that tell something of a tensor and read no value"""
LOOKUPS = frozenset((torch.embedding, torch.nn.functional.embedding))
"""functions that choose rows of their one matrix"""
CHANGES = frozenset(("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"))
"""methods that change a tensor, beside those whose name ends in one underscore"""
LINEAR = ("input", "weight", "bias")
"""parameters of torch.nn.functional.linear"""
FIRST = ("input", "self", "tensor")
"""names of a function's first parameter, where it is the tensor that is viewed or changed"""


class Widened(torch.Tensor):
    """A parameter in a narrower number format that says it is fp64, and is wherever something is computed with it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.nn.Parameter:
        """A copy with memory of its own, in the same stored format."""
        with torch._C.DisableTorchFunctionSubclass():
            stored = self.detach().clone()
        made = torch.nn.Parameter(stored.as_subclass(Widened), requires_grad=False)
        memo[id(self)] = made
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        """Compute with fp64 values; views stay as they are stored."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.nn.functional.linear and kwargs.keys() <= set(LINEAR[len(args):]):
                given = [*args, *(kwargs.get(key) for key in LINEAR[len(args):])]
                if given[0] is not None and isinstance(given[1], cls):
                    return linear(_wide(given[0]), *given[1:])
            if func in LOOKUPS:
                return func(*args, **kwargs).double()
            owner, name = getattr(func, "__self__", None), func.__name__
            if name == "__get__":  # a property: `func` is bound to its descriptor
                found = func(*args, **kwargs)
                if isinstance(found, torch.Tensor):
                    return found.as_subclass(cls)
                return torch.float64 if owner is torch.Tensor.dtype else found
            if name == "__set__" or name in FACTS:
                return func(*args, **kwargs)
            first = args[0] if args else next((kwargs[key] for key in FIRST if key in kwargs), None)
            if name in VIEWS and isinstance(first, cls):
                return _marked(func(*args, **kwargs))
            changes = isinstance(first, cls) and (name in CHANGES or name.rstrip("_") + "_" == name)
            if changes or isinstance(kwargs.get("out"), cls):
                raise TypeError(f"{name}: a widened parameter shares its memory and cannot be changed in place")
            return func(*_wide(args), **{key: _wide(value) for key, value in kwargs.items()})


def widened(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model that computes in fp64 and shares its matrices. Buffers and small parameters are cast.

    Args:
        model: stays as it is. What later changes its matrices in place changes the copy's too; a new tensor that is
            put into a parameter of either does not.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        stored = parameter.detach()
        if stored.is_floating_point():
            lazy = stored.dim() > 1 and stored.numel() >= SMALLEST and stored.dtype is not torch.float64
            stored = stored.as_subclass(Widened) if lazy else stored.to(torch.float64, copy=True)
            memo[id(parameter)] = torch.nn.Parameter(stored, requires_grad=False)
    made = copy.deepcopy(model, memo)
    for module in made.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(torch.float64)
    return made


def linear(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """torch.nn.functional.linear in fp64 of a weight [N, K] in any format, cast some rows at a time."""
    rows = max(1, BLOCK // weight.shape[1])
    if len(weight) <= rows:
        return torch.nn.functional.linear(values, _cast(weight), _wide(bias))
    made = values.new_empty((*values.shape[:-1], len(weight)))
    for start in range(0, len(weight), rows):
        made[..., start: start + rows] = torch.nn.functional.linear(values, _cast(weight[start: start + rows]))
    return made if bias is None else made.add_(_wide(bias))


_kept = threading.local()


def _cast(weight: torch.Tensor) -> torch.Tensor:
    """A matrix of few elements in fp64, in memory that this thread's next cast overwrites: fresh memory costs the
    system three times what the cast costs."""
    if weight.numel() > BLOCK:
        return weight.double()
    if not hasattr(_kept, "memory"):
        _kept.memory = torch.empty(BLOCK, dtype=torch.float64)
    memory: torch.Tensor = _kept.memory
    return memory[: weight.numel()].view(weight.shape).copy_(weight)


def _wide(value: Any) -> Any:
    """A value in which every `Widened` tensor, at any depth of lists and tuples, is one in fp64."""
    if isinstance(value, Widened):
        return value.double()
    if type(value) in (list, tuple):
        return type(value)(map(_wide, value))
    return value


def _marked(found: Any) -> Any:
    """Views of a `Widened` tensor as such."""
    if isinstance(found, torch.Tensor):
        return found.as_subclass(Widened)
    return type(found)(map(_marked, found)) if isinstance(found, (list, tuple)) else found
