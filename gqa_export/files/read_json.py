"""A JSON object from a file that nobody vouches for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import GqaExportError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. GqaExportError where there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("not a JSON object")
        return data
    except (ValueError, RecursionError) as error:
        raise GqaExportError(f"{path.name} is not valid JSON: {error}", str(path), "download it again") from error
    except OSError as error:
        raise GqaExportError(f"cannot read the file: {error.strerror}", str(path), "check its permissions") from error
