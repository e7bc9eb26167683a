"""Write the JSON schemas of what gqa-export writes, from the dataclasses that define it: the manifest of a bundle and
the report of `validate --json`. Tests compare the files with the definitions; run this after a definition has changed.

    python scripts/write_schemas.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gqa_export.bundle import manifest
from gqa_export.report import json_schema


def schemas() -> dict[Path, dict[str, Any]]:
    """Every schema file with what belongs in it."""
    return {manifest.SCHEMA_FILE: manifest.json_schema(), json_schema.SCHEMA_FILE: json_schema.schema()}


def text(schema: dict[str, Any]) -> str:
    """A schema as it is committed."""
    return json.dumps(schema, indent=1) + "\n"


if __name__ == "__main__":
    for path, schema in schemas().items():
        path.write_text(text(schema), encoding="utf-8")
        print(path)
