"""The packages that gqa-export requires, from its own metadata, so that pyproject.toml and `doctor` cannot disagree.

Versions are compared by `packaging`; where that is missing (`doctor` runs with click alone) no version is compared.
Standard library only, otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata

from .tensorrt_libraries import SOURCES

EXTRAS = ("ort", "plugins", "trt", "rtx")
"""the extras whose packages are listed; of the others only what an ability needs"""
SAME = {"tensorrt-rtx-cu13-bindings": "tensorrt-rtx"}
"""distribution -> name of the package that it is a build of"""
BESIDE = {"onnxruntime-ep-nv-tensorrt-rtx-cu13": "tensorrt-rtx"}
"""distribution that brings no module of its own -> the package that needs it"""
MODULES = {"cuda-bindings": ("cuda.bindings",), "tensorrt": SOURCES["tensorrt"].modules,
           "tensorrt-rtx": SOURCES["rtx"].modules}
"""the modules of packages whose module has another name; alternatives"""


@dataclass(frozen=True)
class Package:
    """A distribution, the modules that prove it works (alternatives), and the pip requirement that installs it.

    beside: requirements that must be installed with it.
    """

    name: str
    modules: tuple[str, ...]
    requirement: str
    beside: tuple[str, ...] = ()


def declared() -> list[str]:
    """The requirements of gqa-export as its metadata has them, extras included; none where it is not installed."""
    try:
        return metadata.requires("gqa-export") or []
    except metadata.PackageNotFoundError:
        return []


def parts(line: str) -> tuple[str, str, str]:
    """(name, requirement without its marker, extra or "") of a line such as `triton>=3.5; extra == "plugins"`."""
    requirement, _, marker = (part.strip() for part in line.partition(";"))
    name = re.match(r"[A-Za-z0-9._-]*", requirement)
    extra = re.search(r"""extra\s*==\s*["']([^"']+)""", marker)
    return (name[0] if name else "").lower().replace("_", "-"), requirement, extra[1] if extra else ""


def packages(lines: Iterable[str], needed: Iterable[str]) -> tuple[Package, ...]:
    """The table of packages.

    Args:
        lines: requirements as `declared` gives them.
        needed: names that must be in the table, required or not.
    """
    wanted, beside = dict.fromkeys(needed, ""), dict[str, list[str]]()
    for line in lines:
        name, requirement, extra = parts(line)
        if name in BESIDE:
            beside.setdefault(BESIDE[name], []).append(requirement)
            continue
        name = SAME.get(name, name)
        if not wanted.get(name) and (not extra or extra in EXTRAS or name in wanted):
            wanted[name] = requirement
    return tuple(Package(name, MODULES.get(name, (name.replace("-", "_"),)), requirement or name,
                         tuple(beside.get(name, ()))) for name, requirement in wanted.items())


def requirement_of(name: str, lines: Iterable[str]) -> str:
    """The requirement of a distribution as declared, or its name."""
    return next((requirement for known, requirement, _ in map(parts, lines) if known == name), name)


def unmet(requirement: str, version: str) -> list[str]:
    """The conditions of a requirement such as "transformers>=5.20,<6" that a version does not meet."""
    try:
        from packaging.requirements import Requirement
        from packaging.version import InvalidVersion, Version
    except ImportError:
        return []
    try:
        found = Version(version)
    except InvalidVersion:
        return []
    return sorted(str(one) for one in Requirement(requirement).specifier if not one.contains(found, prereleases=True))
