"""The part of JSON Schema that `verdict.schema.json` uses, so that the tests need no further package."""

from __future__ import annotations

from typing import Any

KINDS: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
                         "integer": int, "number": (int, float)}


def misfit(data: Any, schema: dict[str, Any], root: dict[str, Any] | None = None, where: str = "$") -> str:
    """Where data departs from a schema first, or "". The part of JSON Schema that the schema file uses: type, const,
    enum, required, properties, items, minItems, anyOf and $ref into $defs."""
    root = root or schema
    if "$ref" in schema:
        return misfit(data, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, where)
    if "anyOf" in schema:
        found = [misfit(data, each, root, where) for each in schema["anyOf"]]
        return "" if "" in found else max(found, key=len)
    if "const" in schema and data != schema["const"]:
        return f"{where} is {data!r}, not {schema['const']!r}"
    if "enum" in schema and data not in schema["enum"]:
        return f"{where} is {data!r}, not one of {schema['enum']}"
    kind = schema.get("type")
    if kind and (not isinstance(data, KINDS[kind]) or (isinstance(data, bool) and kind in ("integer", "number"))):
        return f"{where} is not of type {kind}"
    if isinstance(data, dict):
        missing = [name for name in schema.get("required", ()) if name not in data]
        if missing:
            return f"{where} lacks {missing[0]}"
        parts = [misfit(data[name], each, root, f"{where}.{name}")
                 for name, each in schema.get("properties", {}).items() if name in data]
        return next((part for part in parts if part), "")
    if isinstance(data, list):
        if len(data) < schema.get("minItems", 0):
            return f"{where} has {len(data)} items"
        parts = [misfit(item, schema.get("items", {}), root, f"{where}[{i}]") for i, item in enumerate(data)]
        return next((part for part in parts if part), "")
    return ""
