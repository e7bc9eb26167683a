"""Where TensorRT and TensorRT for RTX are: the Python module and the folder of shared libraries of each, from whatever
packages brought them. Standard library only.

TensorRT's parser opens `libtensorrt_rtx.so` by its bare name when it meets a plugin, and ends the process if that
fails; the dynamic loader reads LD_LIBRARY_PATH only when a process starts. So a graph is parsed in a process of its own
in the environment of `visible`, which names a folder of links.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

from ..errors import GqaExportError
from ..files.scratch import scratch_folder
from .packages import installed_version

# In the order in which they can be loaded; the packages hold more, some of which needs a GPU's driver.
WANTED = ("libcudart", "libtensorrt_rtx", "libtensorrt_onnxparser_rtx", "libnvinfer", "libnvonnxparser")
SEARCH_PATH = "PATH" if sys.platform == "win32" else "LD_LIBRARY_PATH"


@dataclass(frozen=True)
class Source:
    """How a flavour is found. modules: its Python module, alternatives. distributions: whose version it has. packages:
    whose folders hold the shared libraries. extra: of gqa-export, that installs it."""

    modules: tuple[str, ...]
    distributions: tuple[str, ...]
    packages: tuple[str, ...]
    extra: str


SOURCES = {
    "tensorrt": Source(("tensorrt", "tensorrt_bindings"),
                       ("tensorrt", "tensorrt-cu13", "tensorrt-cu13-bindings", "tensorrt-cu12"),
                       ("tensorrt_libs",), "trt"),
    "rtx": Source(("tensorrt_rtx", "tensorrt_rtx_bindings"),
                  ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings"),
                  ("tensorrt_rtx_libs", "onnxruntime_ep_nv_tensorrt_rtx"), "rtx"),
}
CANONICAL = {flavor: source.modules[0] for flavor, source in SOURCES.items()}
"""the name that other packages (Polygraphy) import it by"""


@dataclass(frozen=True)
class Library:
    """One flavour as it is installed here. files: its shared libraries, () where the system has them."""

    flavor: str
    module: str
    version: str
    files: tuple[Path, ...]


def _spec(name: str) -> ModuleSpec | None:
    try:
        return find_spec(name)
    except (ImportError, ValueError):  # an import hook that refuses: as good as missing
        return None


def find(flavor: str) -> Library:
    """The library of a flavour, "tensorrt" or "rtx".

    Raises:
        GqaExportError: it is not installed.
    """
    source = SOURCES[flavor]
    module = next((name for name in source.modules if _spec(name) is not None), "")
    if not module:
        raise GqaExportError(f"{source.modules[0]} is not installed", f"--flavor {flavor}",
                             f"pip install 'gqa-export[{source.extra}]'", code="E-ENV-TENSORRT")
    version = next((found for name in source.distributions if (found := installed_version(name))), "unknown")
    return Library(flavor, module, version, _shared_libraries(source.packages))


def is_there(flavor: str) -> bool:
    """Whether a flavour is installed."""
    return any(_spec(name) is not None for name in SOURCES[flavor].modules)


def _shared_libraries(packages: tuple[str, ...]) -> tuple[Path, ...]:
    for name in packages:
        spec = _spec(name)
        folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
        files = [file for wanted in WANTED for folder in folders for file in sorted(folder.glob(f"{wanted}*.so*"))]
        if files:
            return tuple(files)
    return ()


def bare_names(file: str) -> list[str]:
    """The names that the loader may look for: libx.so.1.7.1 -> libx.so, libx.so.1, libx.so.1.7, libx.so.1.7.1."""
    stem, _, numbers = file.partition(".so")
    parts = [part for part in numbers.split(".") if re.fullmatch(r"[0-9]+", part)]
    return [f"{stem}.so" + "".join(f".{part}" for part in parts[:count]) for count in range(len(parts) + 1)]


def preload(library: Library) -> None:
    """Load the shared libraries into this process, so that the Python module can be imported without any search path.

    Enough to run engines; parsing a graph with a plugin needs `visible`. Raises GqaExportError.
    """
    for file in library.files:
        if "builder_resource" in file.name:  # gigabytes that only a build opens, by itself
            continue
        try:
            ctypes.CDLL(str(file), ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise GqaExportError(f"{file.name} cannot be loaded: {error}", str(file.parent),
                                 f"pip install --force-reinstall 'gqa-export[{SOURCES[library.flavor].extra}]'",
                                 code="E-ENV-TENSORRT") from error


@contextmanager
def visible(library: Library) -> Iterator[dict[str, str]]:
    """The environment for a process in which the library's files are found by their bare names."""
    with _linked(library.files) as environment:
        yield environment


@contextmanager
def all_visible() -> Iterator[dict[str, str]]:
    """The same for every flavour that is installed here."""
    with _linked(tuple(file for flavor in SOURCES if is_there(flavor) for file in find(flavor).files)) as environment:
        yield environment


@contextmanager
def _linked(files: tuple[Path, ...]) -> Iterator[dict[str, str]]:
    with scratch_folder("libraries") as folder:
        for file in files:
            for name in bare_names(file.name):
                link = folder / name
                if not link.exists():
                    link.symlink_to(file.resolve())
        before = os.environ.get(SEARCH_PATH, "")
        folders = [str(folder)] if files else []
        yield {**os.environ, SEARCH_PATH: os.pathsep.join([*folders, *([before] if before else [])])}
