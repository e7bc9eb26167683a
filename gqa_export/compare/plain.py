"""Data as JSON can hold it."""

from __future__ import annotations

from typing import Any

import numpy as np


def plain(data: Any) -> Any:
    """The same in dicts, lists and Python's own numbers. Numbers that are not finite become strings ("inf", "nan")."""
    if isinstance(data, dict):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [plain(value) for value in data]
    if isinstance(data, np.generic):
        data = data.item()
    return str(data) if isinstance(data, float) and not np.isfinite(data) else data
