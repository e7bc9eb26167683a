"""Versions of the packages that a result rests on."""

from __future__ import annotations

from collections.abc import Iterable

from .packages import installed_version

COMPARED = ("gqa-export", "torch", "transformers", "onnxruntime", "onnxruntime-gpu", "polygraphy", "numpy")
"""the packages that a comparison rests on"""


def versions(names: Iterable[str] = COMPARED, absent: str = "") -> dict[str, str]:
    """Versions of installed distributions by name. One that is not installed is left out, or has the word `absent`."""
    found = {name: installed_version(name) or absent for name in names}
    return {name: version for name, version in found.items() if version}
