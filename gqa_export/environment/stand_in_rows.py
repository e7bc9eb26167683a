"""What the rows of the table in `stand_ins` are made of."""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

LATER = "later"
"""kind of a name: a class or function, which is looked up when it is called, compared or looked into"""
REPLAYED = "replayed"
"""kind of a name: a decorator that gives back what it is given; its calls are repeated when the module's code runs"""

DISABLED = "disabled"
"""kind of a name: `torch._dynamo.disable` as `torch._compile` calls it; before any compiler runs there is none to keep
away from a function"""

SWITCH = "GQA_EXPORT_STAND_INS"
"""environment variable: "off" imports everything as ever, names of modules (with commas) these"""
NATIVE = "native code"
"""who looks into a module where the Python code that runs does not"""


@functools.cache
def _installed(package: str) -> str:
    """The installed version of a distribution; "" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@dataclass(frozen=True)
class Row:
    """What a row of the table says of its upstream.

    Attributes:
        module: the name of a module.
        package: the distribution it belongs to.
        versions: of the distribution, starts of those that the row was measured with; with another, nothing is done.
        seconds: that importing the module took, with what it brings; 0 where another row counts it.
        until: when the row is to be deleted.
    """

    module: str
    package: str
    versions: tuple[str, ...]
    seconds: float
    until: str

    def applies(self) -> bool:
        """Whether the installed version is one that this row was measured with, and nobody switched the table off."""
        off = os.environ.get(SWITCH, "").split(",")
        if self.module in off or off[0].lower() in ("off", "0"):
            return False
        installed = _installed(self.package)
        return any(installed == known or installed.startswith((f"{known}.", f"{known}+")) for known in self.versions)


@dataclass(frozen=True)
class StandIn(Row):
    """A module that is not run when it is imported.

    Attributes:
        names: what is given out before it runs: LATER, REPLAYED, DISABLED, the submodule that holds the real thing, or
            a function of the module that makes a stand-in.
        importers: starts of the names of modules that are given these; whoever else looks into it makes it run.
        free: submodules that run without it.
        first: a submodule of `free` to be imported before the others of it, "" for none.
        reads_code: it reads the code of others, so when it runs, nothing may be a stand-in any more.
    """

    names: Mapping[str, str | Callable[[types.ModuleType], Any]] = field(default_factory=dict)
    importers: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    first: str = ""
    reads_code: bool = False


@dataclass(frozen=True)
class Change(Row):
    """A module that is changed when it has run, before anybody sees it.

    Attributes:
        symbol: what of it is changed.
        change: changes it; None where the change is made elsewhere, around a call.
    """

    symbol: str = ""
    change: Callable[[types.ModuleType], None] | None = None
