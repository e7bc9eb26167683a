"""Sets in the order of their elements' text, in the code of a model that is traced.

Gemma 3 computes its rotary tables `for layer_type in set(self.config.layer_types)`, and so do a dozen others. Strings
hash otherwise in each process (PYTHONHASHSEED), so the same checkpoint gave graphs that differ in the order of these
tables: the same numbers in other bytes. Where transformers sorts its layer types itself it sorts their text too.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class _AsBuiltin(type):
    """`isinstance` with the class below means what it means with `set`."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, builtins.set)


class SortedSet(builtins.set, metaclass=_AsBuiltin):  # type: ignore[type-arg]
    """A set that is iterated in the order of its elements' `repr`. Results of its operators are plain sets."""

    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(super().__iter__(), key=repr))


@contextmanager
def sorted_sets(modules: Iterable[str]) -> Iterator[None]:
    """Inside, a call of `set` in the code of these modules makes a `SortedSet`. Set displays are what they are.

    Args:
        modules: dotted names; those that are not imported, and those that have a `set` of their own, are left out.
    """
    changed: list[Any] = [module for name in modules
                          if (module := sys.modules.get(name)) is not None and not hasattr(module, "set")]
    try:
        for module in changed:
            module.set = SortedSet
        yield
    finally:
        for module in changed:
            del module.set
