"""A module that runs when something of it is used, not when somebody imports it.

What the importers that its row names take from it are stand-ins; the first use of one, or any other look into the
module, runs its code in that same module object, so that everybody holds the real module from then on. Nothing is ever
wrong, only later.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import sys
import threading
import types
from collections.abc import Iterable, Iterator
from typing import Any

from .stand_in_rows import DISABLED, LATER, NATIVE, REPLAYED, StandIn

_lock = threading.RLock()
PATIENCE = 120.0
"""seconds that a thread waits for another to run a module: they may wait for each other, one here and one for an import
that the other is in the middle of"""


class Deferred(types.ModuleType):
    """A module whose code has not run. It becomes an ordinary one, the same object, by `run`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__all__", "__version__", "__getattr__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        entry: StandIn | None = self.__dict__.get("_gqa_stand_in")
        if entry is None:  # another thread runs it since
            return getattr(self, name)
        inside = f"{self.__name__}.{name}"
        if inside in sys.modules or inside in entry.free:
            return importlib.import_module(inside)
        kind = entry.names.get(name)
        importer = _importer(name)
        if kind == REPLAYED:
            return _Replayed(self, name)
        if kind is None or not importer.startswith(entry.importers):
            run(self)
            return getattr(self, name)
        if kind == LATER:
            return Later(self.__name__, name, importer)
        if callable(kind):
            return kind(self)
        if kind == DISABLED:
            return functools.partial(_left_alone, self)
        return getattr(importlib.import_module(kind), name)

    def __dir__(self) -> Iterable[str]:
        run(self)
        return dir(self)


class Running(types.ModuleType):
    """A deferred module while its code runs: other threads wait for what is not there yet."""

    def __getattr__(self, name: str) -> Any:
        waits = not name.startswith("__") and self.__dict__.get("_gqa_runner") != threading.get_ident()
        if waits and _lock.acquire(timeout=PATIENCE):
            _lock.release()
            if type(self) is not Running:
                return getattr(self, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}"
                             + (", another thread is in the middle of its import" if waits else ""))


@contextlib.contextmanager
def _held() -> Iterator[None]:
    """The lock, inside.

    Raises:
        ImportError: the thread that has it waits for this one, it seems.
    """
    if not _lock.acquire(timeout=PATIENCE):
        raise ImportError("another thread has been running a module for too long")
    try:
        yield
    finally:
        _lock.release()


def _importer(name: str) -> str:
    """The name of the module whose code looks for `name` in a deferred one; NATIVE if its code does not name it."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__") == "importlib._bootstrap":
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")) if name in frame.f_code.co_names else NATIVE


def run(module: types.ModuleType) -> None:
    """Run the code of a deferred module, after that of the packages around it; nothing for any other.

    Raises whatever that code raises; the module is then no longer imported.
    """
    with _held():
        outer = sys.modules.get(module.__name__.rpartition(".")[0])
        if isinstance(outer, Deferred):
            run(outer)
        if not isinstance(module, Deferred):
            return
        inside = {name: one for name, one in sys.modules.items()
                  if isinstance(one, Deferred) and name.startswith(f"{module.__name__}.")}
        for name in inside:  # its code imports them where it needs them
            waiting[name] = inside[name]
            del sys.modules[name]
        row, calls = _to_running(module)
        try:
            module.__loader__.exec_module(module)  # type: ignore[union-attr]
        except BaseException:
            sys.modules.pop(module.__name__, None)
            raise
        finally:
            _to_ordinary(module)
            for name in [name for name in inside if name in waiting]:
                sys.modules.setdefault(name, waiting.pop(name))
        for name, given in calls:
            if name == DISABLED:  # `torch._compile` asks again
                vars(given).pop("__dynamo_disable", None)
            else:
                getattr(module, name)(given)
        put_in_place([stand_in for stand_in in given_out if stand_in._gqa_module == module.__name__])
        if row.reads_code:
            settle()


waiting: dict[str, Deferred] = {}
"""deferred modules whose package is running"""


def _to_running(module: types.ModuleType) -> tuple[StandIn, list[tuple[str, Any]]]:
    """Make a deferred module one that runs, still empty; its row, and the calls of its decorators."""
    module.__dict__["_gqa_runner"] = threading.get_ident()
    module.__class__ = Running
    row: StandIn = module.__dict__.pop("_gqa_stand_in")
    calls: list[tuple[str, Any]] = module.__dict__.pop("_gqa_calls")
    return row, calls


def _to_ordinary(module: Any) -> None:
    """Make a module that has run an ordinary one, unless its code gave it another class."""
    ordinary: Any = types.ModuleType
    if type(module) is Running:
        module.__class__ = ordinary
    module.__dict__.pop("_gqa_runner", None)


def settle() -> None:
    """Run all that waits, and put the real thing in the place of every stand-in, in tables too: whoever reads the code
    of others, as a compiler does, must find in it what is written there. What cannot run fails when it is used."""
    for module in [module for module in list(sys.modules.values()) if isinstance(module, Deferred)]:
        with contextlib.suppress(Exception):
            run(module)
    ready = [stand_in for stand_in in given_out if not isinstance(sys.modules.get(stand_in._gqa_module), Deferred)]
    put_in_place(ready, [holder for holder in gc.get_referrers(*ready) if isinstance(holder, dict)] if ready else [])


def put_in_place(stand_ins: Iterable[Later], tables: Iterable[dict[Any, Any]] = ()) -> None:
    """Replace stand-ins whose modules have run, in the modules that imported them and in these tables."""
    for stand_in in list(stand_ins):
        module = sys.modules.get(stand_in._gqa_module)
        importer = sys.modules.get(stand_in._gqa_importer)
        if module is None or not hasattr(module, stand_in._gqa_name):
            continue
        for table in (*([vars(importer)] if importer else []), *tables):
            for name in [name for name, value in list(table.items()) if value is stand_in]:
                table[name] = getattr(module, stand_in._gqa_name)


given_out: list[Later] = []
"""the stand-ins of classes and functions"""


def _left_alone(module: types.ModuleType, function: Any, recursive: bool = True, **named: Any) -> Any:
    """The stand-in of `torch._dynamo.disable`: the function itself, until the module runs."""
    with _lock:
        if isinstance(module, Deferred) and named == {"wrapping": False}:
            module.__dict__["_gqa_calls"].append((DISABLED, function))
            return function
    run(module)
    return module.disable(function, recursive, **named)


class _Replayed:
    """The stand-in of a decorator that gives back what it is given."""

    def __init__(self, module: Deferred, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self, given: Any, *others: Any, **named: Any) -> Any:
        with _lock:
            if callable(given) and not others and not named and isinstance(self.module, Deferred):
                self.module.__dict__["_gqa_calls"].append((self.name, given))
                return given
        return self.real(given, *others, **named)

    @property
    def real(self) -> Any:
        """The decorator itself."""
        run(self.module)
        return getattr(self.module, self.name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class Later:
    """The stand-in of a class or function. Whatever is done with it is done with the real one, which takes its place in
    the module that imported it."""

    def __init__(self, module: str, name: str, importer: str) -> None:
        self.__dict__.update(_gqa_module=module, _gqa_name=name, _gqa_importer=importer)
        given_out.append(self)

    def _gqa_real(self) -> Any:
        module = importlib.import_module(self._gqa_module)
        run(module)
        put_in_place([self])
        return getattr(module, self._gqa_name)

    def __instancecheck__(self, one: Any) -> bool:
        # A class whose module has not run has no instances.
        return not isinstance(sys.modules.get(self._gqa_module), Deferred) and isinstance(one, self._gqa_real())

    def __subclasscheck__(self, one: Any) -> bool:
        return not isinstance(sys.modules.get(self._gqa_module), Deferred) and issubclass(one, self._gqa_real())

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._gqa_real()(*given, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gqa_real(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._gqa_real(), name, value)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._gqa_real(),)

    def __getitem__(self, key: Any) -> Any:
        return self._gqa_real()[key]

    def __contains__(self, key: Any) -> bool:
        return key in self._gqa_real()

    def __iter__(self) -> Any:
        return iter(self._gqa_real())

    def __or__(self, other: Any) -> Any:
        if other is None and isinstance(sys.modules.get(self._gqa_module), Deferred):
            return OrNone(self)
        return self._gqa_real() | other

    def __ror__(self, other: Any) -> Any:
        return other | self._gqa_real()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Later):
            return (self._gqa_module, self._gqa_name) == (other._gqa_module, other._gqa_name)
        # Classes and functions equal themselves alone, and this one does not exist before its module has run.
        return not isinstance(sys.modules.get(self._gqa_module), Deferred) and bool(self._gqa_real() == other)

    def __hash__(self) -> int:
        return hash(self._gqa_real())


class OrNone:
    """What `X | None` is for the stand-in of a class X: an annotation, mostly."""

    def __init__(self, later: Later) -> None:
        self._later = later

    def __instancecheck__(self, one: Any) -> bool:
        return one is None or self._later.__instancecheck__(one)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._later._gqa_real() | None, name)

    def __or__(self, other: Any) -> Any:
        return (self._later._gqa_real() | None) | other

    def __eq__(self, other: object) -> bool:
        return bool((self._later._gqa_real() | None) == other)

    def __hash__(self) -> int:
        return hash(self._later._gqa_real() | None)
