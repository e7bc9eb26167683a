"""The source files of transformers that decide what a trace is, found by path: nothing is imported.

They are the modelling and configuration files of each `model_type` of a configuration, what those import from other
models (a class that they inherit from), and the shared modules at the root of transformers (masks, rotary embeddings,
caches, activations, the loading of weights) and its integrations (attention functions, experts).
"""

from __future__ import annotations

import inspect
import re
import sys
import sysconfig
import types
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SHARED = ("*.py", "integrations/*.py")
"""patterns below the folder of transformers: what every model may use"""
FILES = ("modeling_*.py", "configuration_*.py")
"""patterns below the folder of one model"""
TYPE = re.compile(r"""^\s+model_type\b[^=\n]*=\s*["']([\w.-]+)["']""", re.MULTILINE)
IMPORT = re.compile(r"^\s*from (?:\.\.|\.\.\.models\.|transformers\.models\.)(\w+)\.(\w+) import", re.MULTILINE)
DEFINED = re.compile(r"^(|    )(class|def) (\w+)", re.MULTILINE)
DECORATORS = ("torch", "huggingface_hub")
"""packages whose decorators put functions of their own into transformers' classes"""
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


def changed_in_memory(config: dict[str, Any], sources: list[Path]) -> bool:
    """Whether this process would not run the code of these files: classes were registered for a `model_type` of the
    configuration, or a class, function or method that a loaded file defines was replaced by another."""
    if "transformers" not in sys.modules:
        return False
    if set(_registered()) & set(_types(config)):
        return True
    root = _installed()
    homes = [str(root), sysconfig.get_paths()["stdlib"]]
    homes += [str(Path(sys.modules[name].__file__ or root).parent) for name in DECORATORS if name in sys.modules]
    for path in sources:
        name = ".".join(("transformers", *path.relative_to(root).with_suffix("").parts))
        module = sys.modules.get(name)
        if module is None or module.__file__ != str(path):
            continue
        if any(_replaced(member, name, homes) for member in _members(module, path)):
            return True
    return False


def _registered() -> list[str]:
    """The `model_type`s for which this process registered classes with transformers."""
    configurations = sys.modules.get("transformers.models.auto.configuration_auto")
    models = sys.modules.get("transformers.models.auto.modeling_auto")
    kinds = list(configurations.CONFIG_MAPPING._extra_content) if configurations else []
    if models is not None:
        kinds += [config.model_type for config in models.AutoModelForCausalLM._model_mapping._extra_content]
    return kinds


def _members(module: Any, path: Path) -> Iterator[Any]:
    """What a loaded module has in the places of the classes, functions and methods that its file defines."""
    owner: Any = None
    for indent, kind, name in DEFINED.findall(path.read_text(encoding="utf-8")):
        if not indent:
            owner = vars(module).get(name)
            yield owner
        elif kind == "def" and isinstance(owner, type):
            yield vars(owner).get(name)


def _replaced(member: Any, module: str, homes: list[str]) -> bool:
    """Whether a class is of another module than this, or a function's code is in a file outside of these folders."""
    if isinstance(member, type):
        return member.__module__ != module
    member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    if not isinstance(member, types.FunctionType):
        return False
    place = inspect.unwrap(member).__code__.co_filename
    return not any(Path(place).is_relative_to(home) for home in homes)
