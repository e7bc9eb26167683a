"""A model of any float type computing in fp32, one module at a time: no second copy of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def in_float(model: torch.nn.Module) -> Iterator[None]:
    """Every module's parameters are fp32 while it runs, and as they were before and after: one module at a time."""
    hooks = []
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.is_floating_point()]
        if not own or all(parameter.dtype == torch.float32 for parameter in own):
            continue
        stored = [parameter.data for parameter in own]

        def widen(_: Any, __: Any, own: list[Any] = own) -> None:
            for parameter in own:
                parameter.data = parameter.data.float()

        def restore(_: Any, __: Any, ___: Any, own: list[Any] = own, stored: list[Any] = stored) -> None:
            for parameter, data in zip(own, stored, strict=True):
                parameter.data = data

        hooks += [module.register_forward_pre_hook(widen), module.register_forward_hook(restore)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
