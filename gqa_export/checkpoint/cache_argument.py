"""The name by which a loaded model takes its cache. Standard library only."""

from __future__ import annotations

import inspect
from typing import Any


def cache_argument(model: Any) -> str:
    """The argument of `model.forward`: `cache` since transformers 5.24, which warns at the older `past_key_values`
    and, of models without attention, `cache_params`."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in known), "past_key_values")
