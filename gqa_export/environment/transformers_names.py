"""The names of transformers, read from its sources when one is asked for that is not at hand.

To know which of its modules has which class, transformers reads the source of every model, 1,600 files, each time it is
imported, and again for its package `models`. An export names the modules it needs; of the classes it asks for by name
all are in `models.auto`.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

AUTO = "auto"
OWN = ("_modules", "_class_to_module", "_object_missing_backend", "_import_structure", "__all__")
"""what transformers' lazy module makes of its table of names"""


class Part(dict[Any, Any]):
    """The table of names of one folder, standing for that of all folders beside it. `whole` reads it."""

    def __init__(self, part: dict[Any, Any], path: Any, prefix: str | None) -> None:
        super().__init__({backends: dict(modules) for backends, modules in part.items()})
        self.setdefault(frozenset(), {})
        self.path, self.prefix = path, prefix


def read_names_later(module: types.ModuleType) -> None:
    """Change transformers' module `utils.import_utils`, which has just run, to read the folder of the automatic
    classes alone, and the others when a lazy module is asked for a name that it does not have."""
    whole: Any = module.define_import_structure
    lazy: Any = module._LazyModule
    models = Path(str(module.__file__)).parent.parent / "models"

    def define_import_structure(module_path: Any, prefix: str | None = None) -> Any:
        path = Path(module_path)
        if path not in (models, models / "__init__.py"):
            return whole(module_path, prefix=prefix)
        return Part(whole(models / AUTO, prefix=f"{prefix}.{AUTO}" if prefix else AUTO), module_path, prefix)

    class Growing(lazy):  # type: ignore[misc]
        """transformers' lazy module, with all names from the first on that is missing."""

        def __init__(self, name: str, module_file: str, import_structure: Any, *others: Any, **named: Any) -> None:
            super().__init__(name, module_file, import_structure, *others, **named)
            if isinstance(import_structure, Part):
                self.__dict__["_gqa_part"] = import_structure
                del self.__dict__["__all__"]

        def __getattr__(self, name: str) -> Any:
            part = self.__dict__.get("_gqa_part")
            known = self.__dict__
            if part is None or any(name in known[table] for table in ("_objects", "_class_to_module", "_modules")):
                return super().__getattr__(name)
            if name.startswith("__") and name != "__all__":
                raise AttributeError(f"module {known['_name']!r} has no attribute {name!r}")
            inside = Path(known["__path__"][0]) / name
            if inside.is_dir() or inside.with_suffix(".py").is_file():
                # A module: the tables of models name those below `models` alone.
                return self._get_module(name) if part.prefix is None else super().__getattr__(name)
            del known["_gqa_part"]
            table = {backends: dict(modules) for backends, modules in
                     whole(part.path, prefix=part.prefix).items()}
            for backends, modules in part.items():
                table.setdefault(backends, {}).update(modules)
            full = lazy(known["_name"], known["__file__"], table)
            known.update({own: vars(full)[own] for own in OWN})
            return getattr(self, name)

    Growing.__module__ = lazy.__module__
    Growing.__name__ = Growing.__qualname__ = lazy.__name__
    module.define_import_structure = define_import_structure  # type: ignore[attr-defined]
    module._LazyModule = Growing  # type: ignore[attr-defined]
