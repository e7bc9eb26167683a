"""What a description says of one module: entries of its own, which several libraries have beside general fields."""

from __future__ import annotations

import json
import re
from typing import Any

from .config_groups import groups_of
from .description import Description, whole_number
from .patterns import matches

DIGITS = re.compile(r"\d+")
SAME_INPUT = re.compile(r"(?<=[._])(?:q|k|v|gate|up)_proj$|(?<=[._])w[13]$")
"""the end of a name whose modules have one input, and one smoothing of it"""


def own_settings(description: Description, module: str) -> dict[str, Any]:
    """The entry of a module itself: of GPTQModel's `dynamic` (patterns, the first that matches), AutoRound's
    `extra_config` (a name or a pattern), Olive's `overrides` (a name), ModelOpt's `quantized_layers` (the module or
    the nearest around it). {} if it has none.

    Raises:
        ValueError: a pattern is not a regular expression.
    """
    for pattern, entry in _entries(description, "dynamic"):
        if matches(pattern.removeprefix("+:").removeprefix("-:"), module):
            return {} if pattern.startswith("-:") else entry
    extra = dict(_entries(description, "extra_config"))
    if (own := extra.get(module)) is not None:
        return own
    for pattern, entry in extra.items():
        if set(pattern) & set("*+?^$()[]{}|\\") and matches(pattern, module, anywhere=True):
            return entry
    overrides = dict(_entries(description, "overrides"))
    if (own := overrides.get(module)) is not None:
        return own
    around = {name: entry for name, entry in _entries(description, "quantized_layers")
              if f"{module}.".startswith(f"{name}.")}
    return around[max(around, key=len)] if around else {}


def settings_of(description: Description, module: str) -> dict[str, Any]:
    """The description's fields as they hold for a module."""
    return {**description.fields, **own_settings(description, module)}


def whole(settings: dict[str, Any], name: str) -> int | None:
    """A field of such settings as a whole number; None if it is not there."""
    return whole_number(name, settings.get(name))


def told_apart(description: Description, module: str) -> str:
    """What sets a module apart from others of a description; equal for those of which it says the same. A module of
    which the group is not known is one of its own."""
    groups = list(groups_of(description, module))
    if len(groups) > 1:
        return module
    own = f"{groups} {json.dumps(own_settings(description, module), sort_keys=True, default=str)}"
    by_name = "fqn" in json.dumps(description.fields.get("quant_type"), default=str).lower()  # torchao, by modules
    return f"{own} {role(module)}" if by_name else own


def role(module: str) -> str:
    """A module's place in any layer: its name without numbers; those of one input have one."""
    return SAME_INPUT.sub("input", DIGITS.sub("#", module))


def _entries(description: Description, name: str) -> list[tuple[str, dict[str, Any]]]:
    found = description.fields.get(name)
    return [(str(key), entry if isinstance(entry, dict) else {}) for key, entry in found.items()] if isinstance(
        found, dict) else []
