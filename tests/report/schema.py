"""Holds a JSON report to the definition that `verdict.schema.json` is generated from."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gqa_export.report.json_schema import definitions


def misfit(data: dict[str, Any], *, unknown_keys: bool = True) -> str:
    """Where a report departs from its definition first, or "". unknown_keys: whether a key may be there beside."""
    single, many = definitions()
    try:
        TypeAdapter(many if "verdicts" in data else single).validate_json(
            json.dumps(data), strict=True, extra="ignore" if unknown_keys else "forbid")
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return ""
