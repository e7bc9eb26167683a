"""Imports from a checkout that is not installed: the folders plugins and models under the names they are known by."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def alias_packages() -> None:
    """Make `gqa_export`, `gqa_plugins` and `gqa_models` importable. Those that are installed are left as they are."""
    if str(ROOT) not in sys.path:
        sys.path.insert(1, str(ROOT))
    for name in ("plugins", "models"):
        try:
            importlib.import_module(f"gqa_{name}")
        except ImportError:
            sys.modules[f"gqa_{name}"] = importlib.import_module(name)
