"""A JSON object from a file that comes from outside. Read with `json`: its readers check what the object holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import InvalidCheckpoint


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InvalidCheckpoint: the file is not a JSON object, or cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("not a JSON object")
        return data
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{path.name} is not valid JSON: {error}", str(path), "download it again",
                                code="E-CKPT-JSON") from error
    except OSError as error:
        raise InvalidCheckpoint(f"cannot read the file: {error.strerror}", str(path), "check its permissions",
                                code="E-FILE-READ") from error
