"""gqa-export: decoder LLMs with grouped-query attention from PyTorch to ONNX and TensorRT, checked against PyTorch.

The public API (`gqa_export.api`) is at hand here, imported when it is first used:

    import gqa_export as gqa

    bundle = gqa.export("org/name-or-folder", "out", target="ort")
    verdict = bundle.validate(against="org/name-or-folder")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import (
        Bundle,
        Session,
        build_engine,
        convert,
        cross_check,
        doctor,
        export,
        inspect,
        measure_long,
        open_bundle,
        plan_export,
        rank_costs,
        uptrain,
    )
    from .compare.verdict import Verdict
    from .errors import (
        GqaExportError,
        InvalidBundle,
        InvalidCheckpoint,
        NotCheckedHere,
        OutputDiffers,
        UnsupportedModel,
    )
    from .exporting.long_plan import LongOptions
    from .runtime.completion import Completion

_PLACES = {
    "api": ("Bundle", "Session", "build_engine", "convert", "cross_check", "doctor", "export", "inspect",
            "measure_long", "open_bundle", "plan_export", "rank_costs", "uptrain"),
    "compare.verdict": ("Verdict",),
    "errors": ("GqaExportError", "InvalidBundle", "InvalidCheckpoint", "NotCheckedHere", "OutputDiffers",
               "UnsupportedModel"),
    "exporting.long_plan": ("LongOptions",),
    "runtime.completion": ("Completion",),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}

__all__ = [
    "Bundle",
    "Completion",
    "GqaExportError",
    "InvalidBundle",
    "InvalidCheckpoint",
    "LongOptions",
    "NotCheckedHere",
    "OutputDiffers",
    "Session",
    "UnsupportedModel",
    "Verdict",
    "__version__",
    "build_engine",
    "convert",
    "cross_check",
    "doctor",
    "export",
    "inspect",
    "measure_long",
    "open_bundle",
    "plan_export",
    "rank_costs",
    "uptrain",
]


def __getattr__(name: str) -> object:
    if name not in _PLACE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_PLACE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
