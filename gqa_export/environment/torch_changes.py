"""What PyTorch does over and over while it is imported, done once, or when its result is used.

Each function changes a module that has just run. The results are the same.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any


def name_callers_alone(module: types.ModuleType) -> None:
    """`torch._library.utils.get_source` names the file and line of a caller; upstream reads the whole file, and looks
    for the sources of every module, to have the line's text too, which it drops."""

    def get_source(stacklevel: int) -> str:
        frame = sys._getframe(stacklevel)
        return f"{inspect.getsourcefile(frame) or inspect.getfile(frame)}:{frame.f_lineno}"

    module.get_source = get_source  # type: ignore[attr-defined]


class _Inspect(types.ModuleType):
    """`inspect`, where a frame's module is asked of the frame before it is looked for among the files of all."""

    def __getattr__(self, name: str) -> Any:
        return getattr(inspect, name)

    def getmodule(self, thing: Any, _filename: str | None = None) -> types.ModuleType | None:
        """As `inspect.getmodule`."""
        if isinstance(thing, types.FrameType):
            known = sys.modules.get(thing.f_globals.get("__name__", ""))
            if known is not None and vars(known) is thing.f_globals:
                return known
        return inspect.getmodule(thing, _filename)


def ask_frames_first(module: types.ModuleType) -> None:
    """`torch.library` asks for the module of the frame that registers an operator."""
    module.inspect = _Inspect("inspect")  # type: ignore[attr-defined]


def make_gradients_later(module: types.ModuleType) -> None:
    """`torch._library.autograd.make_autograd_impl` makes three classes for each operator that Python code registers,
    140 of them; they are made when the operator is called on a tensor that autograd knows."""
    make: Callable[..., Callable[..., Any]] = module.make_autograd_impl

    @functools.wraps(make)
    def make_autograd_impl(op: Any, info: Any) -> Callable[..., Any]:
        made: list[Callable[..., Any]] = []

        def autograd_impl(keyset: Any, *given: Any, **named: Any) -> Any:
            if not made:
                made.append(make(op, info))
            return made[0](keyset, *given, **named)

        return autograd_impl

    module.make_autograd_impl = make_autograd_impl  # type: ignore[attr-defined]


def materialize_once(module: types.ModuleType) -> None:
    """`torch._export.utils` looks up every operator of C++ that is made of others once per namespace, of which there
    are two dozen; those that it has looked up are there already."""
    materialize: Callable[[], None] = module._materialize_cpp_cia_ops
    known: list[list[str]] = []

    def _materialize_cpp_cia_ops() -> None:
        import torch

        there = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
        if known != [there]:
            materialize()
            known[:] = [there]

    module._materialize_cpp_cia_ops = _materialize_cpp_cia_ops  # type: ignore[attr-defined]
