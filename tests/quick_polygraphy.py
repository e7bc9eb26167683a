"""Polygraphy's look at the kind of every array, remembered: it takes a third of the time in which tiny models are
compared.

For each array that passes through it Polygraphy 0.53 builds a table of NumPy's types anew, asks the import system
whether NumPy and PyTorch can be imported, and imports a class. None of that changes while a process runs. What is
compared and how stays Polygraphy's own; README.md, and whatever tests start as a Python of its own, run without this.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

TYPES = {"numpy": ("ndarray", "generic", "dtype"), "torch": ("Tensor",)}
"""of a lazily imported module: the classes that are looked up for every array"""


def quicken() -> None:
    """Remember, if Polygraphy is loaded and does as described; where it is made otherwise, nothing is changed."""
    arrays, numbers = (sys.modules.get(f"polygraphy.{name}") for name in ("util.array", "datatype.numpy"))
    if arrays is None or numbers is None or getattr(arrays, "_quick", False):
        return
    arrays._quick = True  # type: ignore[attr-defined]
    if hasattr(numbers, "_get_mapping"):
        numbers._get_mapping = functools.cache(numbers._get_mapping)
    for place, short in ((arrays, "np"), (arrays, "torch"), (numbers, "np")):
        _remember(getattr(place, short, None), {"np": "numpy"}.get(short, short))
    if hasattr(arrays, "is_device_view"):
        from polygraphy.cuda import DeviceView

        arrays.is_device_view = lambda found: isinstance(found, DeviceView)


def _remember(lazy: Any, name: str) -> None:
    """Answers of one lazily imported module, whose class is its own."""
    kind = type(lazy)
    if kind.__name__ != "LazyModule" or not lazy.is_importable():
        return
    kind.is_importable = kind.is_installed = lambda self: True
    for each in TYPES[name]:
        setattr(kind, each, getattr(sys.modules[name], each))
