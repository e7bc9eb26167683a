"""The finder of modules that run later: it stands before Python's own, and `install` puts it there."""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .deferred_module import Deferred, run, waiting
from .stand_in_rows import Change, Row, StandIn


@dataclass
class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of a table as deferred ones, and sees to it that a package runs before its submodules."""

    entries: Mapping[str, StandIn]
    changes: Mapping[str, Callable[[types.ModuleType], None]]
    free: Mapping[str, StandIn] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = {name: entry for entry in self.entries.values() for name in entry.free}

    def find_spec(self, name: str, path: Sequence[str] | None = None,
                  target: types.ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module that is deferred, or that something must run before; None for any other."""
        before: Callable[[], object] | None = None
        if name in waiting:
            before = functools.partial(_resume, name)
        elif name in self.free and not self.defers(name):
            first = self.free[name].first
            before = None if first in ("", name) else functools.partial(importlib.import_module, first)
        elif not self.defers(name):
            before = _running(name)
        if before is None and not self.defers(name) and name not in self.changes:
            return None
        found = importlib.machinery.PathFinder.find_spec(name, path, target)
        if found is not None and found.loader is not None:
            found.loader = (_Changing(found.loader, self.changes[name]) if name in self.changes else
                            _After(found.loader, before) if before else
                            _Deferring(found.loader, self.entries[name]))
        return found


    def defers(self, name: str) -> bool:
        """Whether this module is to be deferred: not if a package around it was, and has run."""
        return name in self.entries and all(isinstance(sys.modules.get(outer), Deferred)
                                            for outer in _around(name) if outer in self.entries)


def _around(name: str) -> Iterator[str]:
    """The names of the packages around a module, the nearest first."""
    while name := name.rpartition(".")[0]:
        yield name


def _resume(name: str) -> None:
    """Put a waiting module back, and run it."""
    sys.modules[name] = waiting.pop(name)
    run(sys.modules[name])


def _running(name: str) -> Callable[[], object] | None:
    """What runs the nearest deferred package around a module; None if there is none."""
    return next((functools.partial(run, sys.modules[outer]) for outer in _around(name)
                 if isinstance(sys.modules.get(outer), Deferred)), None)


class _Deferring(importlib.abc.Loader):
    """Creates a deferred module around the loader that will run its code."""

    def __init__(self, real: Any, entry: StandIn) -> None:
        self.real, self.entry = real, entry

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """The module, empty."""
        return Deferred(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Note what will run it."""
        module.__spec__.loader = module.__loader__ = self.real  # type: ignore[union-attr]
        module.__dict__.update(_gqa_stand_in=self.entry, _gqa_calls=[])


class _Changing(importlib.abc.Loader):
    """Loads a module and changes it before anybody sees it."""

    def __init__(self, real: Any, change: Callable[[types.ModuleType], None]) -> None:
        self.real, self.change = real, change

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        """As ever."""
        return self.real.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        """Run its code, then the change."""
        module.__spec__.loader = module.__loader__ = self.real  # type: ignore[union-attr]
        self.real.exec_module(module)
        self.change(module)


class _After(importlib.abc.Loader):
    """Loads a module after something else, unless it came to be on the way."""

    def __init__(self, real: Any, before: Callable[[], object]) -> None:
        self.real, self.before = real, before
        self.there: importlib.machinery.ModuleSpec | None = None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        """The module that came to be, or a new one."""
        self.before()
        module = sys.modules.get(spec.name)
        if module is None:
            return self.real.create_module(spec)
        self.there = module.__spec__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Run its code, if that was not done."""
        if self.there is not None:
            module.__spec__ = self.there
            return
        module.__spec__.loader = module.__loader__ = self.real  # type: ignore[union-attr]
        self.real.exec_module(module)


def install(table: Iterable[Row]) -> Callable[[], None]:
    """Put the rows of a table in force whose module is not imported yet and whose upstream is the one they were
    measured with. Returns what ends it for modules that are imported later; those that wait to be used still do."""
    rows = [row for row in table if row.module not in sys.modules and row.applies()]
    finder = Finder({row.module: row for row in rows if isinstance(row, StandIn)},
                    {row.module: row.change for row in rows if isinstance(row, Change) and row.change})
    sys.meta_path.insert(0, finder)
    return lambda: sys.meta_path.remove(finder)
