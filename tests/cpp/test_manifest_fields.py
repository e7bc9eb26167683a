"""The C++ reader of an engine bundle's manifest reads fields that the schema has, as the types that the schema says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import gqa_export
from gqa_export.bundle.manifest import FORMAT, SCHEMA_FILE

SOURCE = Path(gqa_export.__file__).parent.parent / "plugins" / "cpp" / "gqa" / "runtime" / "manifest.cpp"
SCHEMA = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
VARIABLES: dict[str, tuple[str, ...]] = {
    "root": (), "fact": ("inputs", "*"), "engine": ("engine",), "profile": ("engine", "profiles", "*"),
    "profiles": ("engine", "profiles"), "most": ("engine", "profiles", "*", "shapes", "input_ids", "2"),
    "parallel": ("parallel",), "own": ("parallel", "ranks", "*"), "layer": ("parallel", "ranks", "*", "heads", "*"),
    "plugin": ("engine", "plugin"), "facts": ("inputs",), "shape": ("inputs", "*", "shape", "*"),
    "one": ("engine", "compute_capabilities", "*"), "past": ("engine", "aliases", "*"),
    "token": ("tokens", "eos", "*")}
"""variable of manifest.cpp that holds a part of the manifest -> where that part is"""
HANDED_ON = {("parallel",): "object", ("parallel", "ranks", "*"): "object",
             ("inputs",): "array", ("outputs",): "array", ("engine",): "object", ("engine", "profiles"): "array",
             ("engine", "profiles", "*"): "object", ("engine", "plugin"): "object", VARIABLES["most"]: "array"}
"""parts that are handed to a variable or a function, and what those take them for"""
TYPES = {"string": {"string"}, "integer": {"integer"}, "boolean": {"boolean"}, "array": {"array"},
         "object": {"object"}, "is_null": {"null"}}
ACCESSOR = r"\.(string|integer|boolean|array|object|is_null)\(\)"
STEPS = r'(?:\.at\((?:"\w+"|[\w.]+)\)|\.item\(\w+\))'
READ = re.compile(rf"\b(\w+)({STEPS}+)(?!{STEPS}|{ACCESSOR}|\.has)|\b(\w+)((?:{STEPS}|\[axis\])*){ACCESSOR}")
STEP = re.compile(r'\.at\("(\w+)"\)|\.at\(([\w.]+)\)|\.item\((\w+)\)')


def reads(source: str) -> list[tuple[tuple[str, ...], str]]:
    """(place in the manifest, type it is read as; "" where it is handed on) of every read in the source."""
    found = []
    for match in READ.finditer(source):
        variable, steps, accessor = match[1] or match[4], match[2] or match[5], match[6] or ""
        place = [*VARIABLES[variable]]
        for name, computed, index in STEP.findall(steps):
            place.append(name or ("*" if computed or not index.isdigit() else index))
        found.append((tuple(place), accessor))
    return found


def resolved(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """A schema without references, one for each alternative."""
    if "$ref" in schema:
        return resolved(SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")])
    return [each for one in schema["anyOf"] for each in resolved(one)] if "anyOf" in schema else [schema]


def types_at(place: tuple[str, ...]) -> set[str]:
    """The types that the schema allows at a place; none where it has no such place."""
    here = resolved(SCHEMA)
    for step in place:
        inner: list[dict[str, Any]] = []
        for schema in here:
            if schema.get("type") == "array":
                items = schema.get("prefixItems", [])
                inner += [items[int(step)]] if step.isdigit() and int(step) < len(items) else [schema.get("items", {})]
            elif step in schema.get("properties", {}):
                inner.append(schema["properties"][step])
            elif "properties" not in schema:
                inner += schema.get("patternProperties", {}).values()
        here = [each for one in inner for each in resolved(one)]
    return {schema.get("type", type(schema.get("const")).__name__.replace("int", "integer")) for schema in here}


def test_every_field_that_cpp_reads_is_in_the_schema_with_that_type():
    source = SOURCE.read_text(encoding="utf-8")
    found = reads(source)
    assert sum(bool(accessor) for _, accessor in found) == len(re.findall(ACCESSOR, source))
    for place, accessor in found:
        wanted = TYPES[accessor] if accessor else {HANDED_ON[place]}
        assert wanted <= types_at(place), f"{SOURCE.name} reads {'.'.join(place)} as {accessor or HANDED_ON[place]}"
    assert len({place for place, _ in found}) > 20


def test_what_cpp_asks_for_with_has_is_in_the_schema():
    names = re.findall(r'(\w+)(?:\.at\("(\w+)"\))?\.has\("(\w+)"\)', SOURCE.read_text(encoding="utf-8"))
    assert {name for _, _, name in names} == {"format", "target", "engine", "parallel", "eos", "window_cache"}
    assert all(types_at((*VARIABLES[variable], *([inner] if inner else []), name)) for variable, inner, name in names)


def test_cpp_and_python_read_the_same_format():
    assert f"kFormat = {FORMAT};" in SOURCE.read_text(encoding="utf-8")
    assert SCHEMA["properties"]["format"]["const"] == FORMAT


@pytest.mark.parametrize(("line", "place"), [
    ('x = root.at("capacty").integer();', ("capacty",)), ('x = engine.at("version").integer();', ("engine", "version")),
    ('x = plugin.at("sha512").string();', ("engine", "plugin", "sha512"))])
def test_a_field_that_is_not_there_or_has_another_type_is_noticed(line, place):
    assert [found for found, _ in reads(line)] == [place]
    assert "integer" not in types_at(place)
