"""The one seam for models whose own code hides what a trace needs: functions put in the place of transformers' own.

Most models need none of it. A patch replaces one function (or one entry of a table) while a model is probed and
traced, and never else: the reference that a bundle is compared with runs transformers as it is. A patch may compute
something in another way (the attention interface instead of two products and a softmax; positions per row instead of a
count); it may not change what is computed. Each file here holds one such rewriting and lists its places in `PATCHES`.

A place names a module of transformers and a dotted path in it. `source_digests.py` holds the start of the sha256 of
each source that a patch was held against, one for every wording that transformers had: a transformers with other code
there is refused, not guessed at. `ABSENT` among them: a transformers without that place was read, and needs no patch.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from ...errors import UnsupportedModel
from ..states.kernels import caught
from .sorted_sets import sorted_sets
from .source_digests import ABSENT, SEEN

FILES = ("alibi", "attention_forward", "attention_method", "attention_table", "deepseek_v2", "diffllama", "experts",
         "falcon", "gemma", "language_adapters", "learned_positions", "llama4", "padding_positions", "roformer")
"""the files of this folder, in the order their patches are applied"""


@dataclass(frozen=True)
class Patch:
    """module: below transformers.models, "gptj.modeling_gptj". path: "Class.method" or "TABLE[key]". make: gets the
    original (None for an entry of a table, which is added) and the module, gives the replacement. why: for the docs."""

    module: str
    path: str
    make: Callable[[Any, Any], Any]
    why: str

    @property
    def place(self) -> str:
        """Module and path in one."""
        return f"{self.module}:{self.path}"


@cache
def registry() -> tuple[Patch, ...]:
    """All patches."""
    return tuple(patch for file in FILES for patch in importlib.import_module(f".{file}", __package__).PATCHES)


def stored(key: Any, value: Any, layer: int, cache: Any, past_key_values: Any) -> tuple[Any, Any]:
    """Keys and values of a layer after its cache took them, as they are where there is none.

    The argument that brings the cache is `cache` since transformers 5.24, `past_key_values` before.
    """
    given = past_key_values if cache is None else cache
    return (key, value) if given is None else given.update(key, value, layer)


def digest(function: Any) -> str:
    """The start of the sha256 of a function's source."""
    return hashlib.sha256(inspect.getsource(inspect.unwrap(function)).encode()).hexdigest()[:12]


@contextmanager
def applied(config: Any) -> Iterator[tuple[Patch, ...]]:
    """Inside, the patches for the model of this transformers config are in place, the answer says which, the kernel
    functions of its state layers are caught, and its sets are sorted.

    Raises GqaExportError where transformers' code is not the code that a patch was written for.
    """
    modules = _modules_of(config)
    wanted = [patch for patch in registry() if f"transformers.models.{patch.module}" in modules]
    undo: list[Callable[[], None]] = []
    fresh = [patch for patch in wanted if patch not in _active]
    try:
        for patch in fresh:
            undo.append(_put(patch))
            _active.append(patch)
        with caught(modules), sorted_sets(modules):
            yield tuple(wanted)
    finally:
        for restore, patch in reversed(list(zip(undo, fresh))):
            restore()
            _active.remove(patch)


_active: list[Patch] = []
"""patches in place now; a trace probes inside its own patches"""


def _modules_of(config: Any) -> set[str]:
    """The modelling modules of a config and of the configs nested in it, imported."""
    found = set()
    for one in (config, *(value for value in vars(config).values() if hasattr(value, "model_type"))):
        name = type(one).__module__.replace(".configuration_", ".modeling_")
        if name not in sys.modules and name.startswith("transformers.models."):
            try:
                importlib.import_module(name)
            except ImportError:
                continue  # a model whose own requirements are missing: building it says so
        found.add(name)
    return found


def _put(patch: Patch) -> Callable[[], None]:
    module = sys.modules[f"transformers.models.{patch.module}"]
    if patch.path.endswith("]"):
        name, _, key = patch.path[:-1].partition("[")
        table = getattr(module, name, None)
        if table is None:  # nothing is looked up there
            return _nothing
        table[key] = patch.make(None, module)
        return lambda: table.pop(key, None)
    *outer, name = patch.path.split(".")
    owner = module
    for part in outer:
        owner = getattr(owner, part)
    original = inspect.getattr_static(owner, name, None)
    if (ABSENT if original is None else digest(original)) not in SEEN.get(patch.place, ()):
        raise UnsupportedModel(f"the installed transformers has other code in {patch.path} than the code that this "
                               "patch replaces", f"transformers.models.{patch.module}",
                               "install the transformers version that `gqa-export models` names, or export another "
                               "architecture", code="E-MODEL-PATCH-STALE")
    if original is None:
        return _nothing
    setattr(owner, name, patch.make(original, module))
    return lambda: setattr(owner, name, original)


def _nothing() -> None:
    """Undoes a patch whose place this transformers does not have."""
