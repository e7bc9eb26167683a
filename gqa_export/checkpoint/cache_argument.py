"""The name by which a loaded model takes its cache. Standard library only."""

from __future__ import annotations

import inspect
from typing import Any


def cache_argument(model: Any) -> str:
    """The argument of `model.forward`: `cache` since transformers 5.24, which warns at the older `past_key_values`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
