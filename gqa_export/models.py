"""The table of architectures: which of transformers' causal language models were checked, and what came of it.

Data: `models/matrix.json`, written by `scripts/matrix.py`; a row per name of `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .errors import GqaExportError

AGAIN = "run `python scripts/matrix.py --resume`, then `python scripts/matrix.py --failed` and commit what it writes"


def table() -> dict[str, Any]:
    """The whole table: `rows` by name, `versions` it was made with, `date`."""
    import gqa_models

    path = Path(gqa_models.__file__).parent / "matrix.json"
    if not path.is_file():
        raise GqaExportError("the table of architectures is missing from this installation", str(path), AGAIN)
    return json.loads(path.read_text(encoding="utf-8"))


def known_names() -> dict[str, str]:
    """Causal-LM names that the installed transformers knows, each with its class (the first if it has several)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return {name: value if isinstance(value, str) else value[0] for name, value in NAMES.items()}


def versions() -> dict[str, str]:
    """Versions of what a row depends on."""
    found = {}
    for name in ("torch", "transformers", "onnx", "onnxruntime", "onnxscript", "onnx-ir"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def missing(rows: dict[str, Any], names: dict[str, str]) -> list[str]:
    """Names without a row."""
    return sorted(set(names) - set(rows))
