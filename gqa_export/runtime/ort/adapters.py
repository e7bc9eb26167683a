"""ONNX Runtime's adapter files: parameters that take the place of a graph's defaults for a run.

Source: onnxruntime, `AdapterFormat` and `LoraAdapter` of the Python API; onnxruntime-genai's `Adapters` reads the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import GqaExportError, InvalidBundle, cause_of
from .loading import import_onnxruntime

SUFFIX = ".onnx_adapter"
VERSION = 1


def write_adapter(path: Path, parameters: Mapping[str, np.ndarray]) -> None:
    """Write an adapter file.

    Args:
        path: of the file.
        parameters: by the names of the graph's inputs.
    """
    ort = import_onnxruntime()
    file = ort.AdapterFormat()
    file.set_adapter_version(VERSION)
    file.set_model_version(VERSION)
    file.set_parameters({name: _value(ort, array) for name, array in parameters.items()})
    file.export_adapter(str(path))


def _value(ort: Any, array: np.ndarray) -> Any:
    if array.dtype.name == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.int16), 16)
    return ort.OrtValue.ortvalue_from_numpy(array)


@dataclass(frozen=True)
class Adapter:
    """An adapter that was read. file: keeps the memory of the values. values: OrtValues by the graph's inputs."""

    name: str
    file: Any
    values: Mapping[str, Any]

    def arrays(self) -> dict[str, np.ndarray]:
        """Copies of the values as arrays. Not for bfloat16, which numpy does not know."""
        return {name: np.array(value.numpy()) for name, value in self.values.items()}


def load_adapter(folder: Path, files: Iterable[str], name: str) -> Adapter:
    """Read a bundle's adapter.

    Args:
        folder: of the bundle. files: their names. name: of the adapter.

    Raises:
        GqaExportError: the bundle has no adapter of this name.
        InvalidBundle: its file cannot be read.
    """
    known = adapter_names(files)
    if name not in known:
        raise GqaExportError(f"the bundle has no adapter {name!r}", str(folder),
                             f"choose one of {', '.join(known)}" if known else
                             "export it with --lora DIR to have adapters to switch between", code="E-RUN-ADAPTER")
    path = folder / f"{name}{SUFFIX}"
    try:
        file = import_onnxruntime().AdapterFormat.read_adapter(str(path))
        return Adapter(name, file, file.get_parameters())
    except Exception as error:  # onnxruntime's own exceptions share no public base class
        raise InvalidBundle(f"the adapter cannot be read: {cause_of(error)}", str(path), "export the bundle again",
                            code="E-BUNDLE-ADAPTER") from error


def adapter_names(files: Iterable[str]) -> list[str]:
    """Names of the adapters among a bundle's files."""
    return sorted(name.removesuffix(SUFFIX) for name in files if name.endswith(SUFFIX))
