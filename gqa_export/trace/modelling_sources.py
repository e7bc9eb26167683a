"""The source files of transformers that decide what a trace is, found by path: nothing is imported.

They are the modelling and configuration files of each `model_type` of a configuration, what those import from other
models (a class that they inherit from), and the shared modules at the root of transformers (masks, rotary embeddings,
caches, activations, the loading of weights) and its integrations (attention functions, experts).
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SHARED = ("*.py", "integrations/*.py")
"""patterns below the folder of transformers: what every model may use"""
FILES = ("modeling_*.py", "configuration_*.py")
"""patterns below the folder of one model"""
TYPE = re.compile(r"""^\s+model_type\b[^=\n]*=\s*["']([\w.-]+)["']""", re.MULTILINE)
IMPORT = re.compile(r"^\s*from (?:\.\.|\.\.\.models\.|transformers\.models\.)(\w+)\.(\w+) import", re.MULTILINE)
LOCAL = re.compile(r"^\s*from \.(\w+) import", re.MULTILINE)


def modelling_sources(config: dict[str, Any], root: Path | None = None) -> list[Path] | None:
    """The files that a trace of this configuration depends on.

    Args:
        config: config.json as read, nested configurations included.
        root: the folder of transformers; None is that of the installed package.

    Returns:
        The files, sorted; None where the files of a `model_type` were not found.
    """
    root = root or _installed()
    types = _types(config)
    folders = [_folder(root / "models", name) for name in types]
    if not types or not all(folders):
        return None
    waiting = [path for folder in folders if folder for pattern in FILES for path in folder.glob(pattern)]
    found: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        text = path.read_text(encoding="utf-8")
        waiting += [root / "models" / folder / f"{module}.py" for folder, module in IMPORT.findall(text)]
        waiting += [path.parent / f"{module}.py" for module in LOCAL.findall(text)]
    return sorted({*found, *(path for pattern in SHARED for path in root.glob(pattern))})


def _installed() -> Path:
    """The folder of the transformers that an import would take."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("transformers is not installed", name="transformers")
    return Path(spec.origin).parent


def _types(config: dict[str, Any]) -> list[str]:
    """Every `model_type` of a configuration and of those inside it."""
    own = config.get("model_type")
    inside = [name for value in config.values() if isinstance(value, dict) for name in _types(value)]
    return list(dict.fromkeys([*([own] if isinstance(own, str) and own else []), *inside]))


def _folder(models: Path, name: str) -> Path | None:
    """The folder whose configuration has this `model_type`: most bear its name, the others are searched for."""
    likely = models / re.sub(r"[^\w]", "_", name)
    for folder in (likely, *sorted(models.iterdir())):
        for path in folder.glob("configuration_*.py"):
            if name in TYPE.findall(path.read_text(encoding="utf-8")):
                return folder
    return None
