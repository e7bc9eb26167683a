"""The file of a bundle that holds by what its scales were chosen: how much errors of each matrix's columns counted, and
where inputs are rounded, how large they were.

With it the same codes come out of the checkpoint again, so that `validate` needs no codes of the bundle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidBundle, cause_of

FILE = "quantization.safetensors"
NAMES = "names"
"""of the file's metadata: name of a parameter -> of the tensor; matrices of one input have one"""
LARGEST = "largest"
"""likewise: name of a parameter -> the largest absolute value of its input"""


def importance_file(importance: Mapping[str, Any], largest: Mapping[str, float] | None = None) -> bytes:
    """The content of the file.

    Args:
        importance: name of a parameter -> float32 `[K]`.
        largest: name of a parameter -> largest absolute value of its input; None: inputs are not rounded by it.
    """
    from safetensors.numpy import save

    tensors: dict[bytes, str] = {}
    names = {name: tensors.setdefault(values.tobytes(), name) for name, values in importance.items()}
    kept = {name: np.frombuffer(data, np.float32) for data, name in tensors.items()}
    return save(kept, {NAMES: json.dumps(names), **({LARGEST: json.dumps(dict(largest))} if largest else {})})


def read_importance(folder: Path) -> dict[str, Any]:
    """How much errors of columns counted: the content of the file in a bundle's folder.

    Raises:
        InvalidBundle: it is missing or cannot be read.
    """
    with _opened(folder) as file:
        names = json.loads(file.metadata()[NAMES])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is not a dict
        return {name: tensors[key] for name, key in names.items()}


def read_largest(folder: Path) -> dict[str, float]:
    """How large the inputs of each matrix were, of the file in a bundle's folder.

    Raises:
        InvalidBundle: it is missing, cannot be read or does not say it.
    """
    with _opened(folder) as file:
        return {name: float(value) for name, value in json.loads(file.metadata()[LARGEST]).items()}


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    from safetensors import safe_open

    path = folder / FILE
    try:
        with safe_open(path, "np") as file:
            yield file
    except Exception as error:  # safetensors raises an error of its own, and JSON, keys and files have theirs
        raise InvalidBundle(f"cannot read by what the scales were chosen: {cause_of(error)}", str(path),
                            "copy the bundle again, or export it again", code="E-BUNDLE-CALIBRATION") from error
