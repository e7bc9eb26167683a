"""What a manifest may say. It comes from outside: every value is held against a rule before anything relies on it.

A rule takes a value and says whether it is sound. Dimensions are bounded, so that no size made of them overflows.
Standard library only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from ..spec import DTYPES

Rule = Callable[[Any], bool]

LARGEST = 1 << 31
"""no dimension of a model reaches this"""
MOST_LAYERS = 1 << 14
MOST_BYTES = 1 << 53
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def count(low: int, high: int = LARGEST) -> Rule:
    """A whole number in a range, ends included."""
    return lambda value: type(value) is int and low <= value <= high


def text(value: Any) -> bool:
    """A text of some length, without the characters that end a file name or drive a terminal."""
    return isinstance(value, str) and len(value) <= 4096 and not CONTROL.search(value)


def number(value: Any) -> bool:
    """A finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def flag(value: Any) -> bool:
    """True or false."""
    return isinstance(value, bool)


def one_of(*values: str) -> Rule:
    """One of these texts."""
    return lambda value: isinstance(value, str) and value in values


def table(value: Any) -> bool:
    """An object."""
    return isinstance(value, dict)


def digest(value: Any) -> bool:
    """A sha256, or "" for none."""
    return isinstance(value, str) and (not value or re.fullmatch("[0-9a-f]{64}", value) is not None)


MANIFEST: dict[str, Rule] = {
    "target": text, "dtype": one_of(*DTYPES, *DTYPES.values()), "cache": one_of("growing", "static"),
    "capacity": count(1), "logits": one_of("all", "last"), "weights": text, "source": table, "tokens": table,
    "versions": table, "bytes_copied": count(0, MOST_BYTES), "bytes_linked": count(0, MOST_BYTES),
    "inputs": lambda value: isinstance(value, list), "outputs": lambda value: isinstance(value, list),
    "files": table, "fallbacks": lambda value: isinstance(value, list), "spec": table,
}
SPEC: dict[str, Rule] = {"model_type": text, "architecture": text, "vocabulary": count(1), "hidden_size": count(0),
                         "max_positions": count(0), "rope": text}
LAYER: dict[str, Rule] = {"layer": count(0, MOST_LAYERS), "num_heads": count(1, 1 << 20),
                          "kv_num_heads": count(1, 1 << 20), "head_size": count(1, 1 << 20),
                          "value_head_size": count(1, 1 << 20), "scale": number, "softcap": number,
                          "window": count(0), "sinks": flag}
TENSOR: dict[str, Rule] = {"name": text, "dtype": text, "shape": lambda value: isinstance(value, list)
                           and len(value) <= 8 and all(text(axis) or count(0)(axis) for axis in value)}
FALLBACK: dict[str, Rule] = {"layer": count(-1, MOST_LAYERS), "wanted": text, "used": text, "reason": text}
FILE: dict[str, Rule] = {"size": count(0, MOST_BYTES), "sha256": digest, "mtime_ns": count(0, 1 << 63),
                         "header_sha256": digest}
ENGINE: dict[str, Rule] = {"flavor": text, "version": text, "attention": text, "plugin_layers": count(0, MOST_LAYERS),
                           "decomposed": flag, "stripped": flag, "build": table, "aliases": table,
                           "file": lambda value: text(value) and inside(value) and "/" not in value}


def inside(name: Any) -> bool:
    """Whether a name is that of a file in the folder: relative, without a way out, on any system."""
    if not isinstance(name, str) or not name or len(name) > 1024 or not text(name) or "\\" in name:
        return False
    parts = PurePosixPath(name).parts
    windows = PureWindowsPath(name)
    return not (PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in parts or not parts
                or any(len(part.encode()) > 255 for part in parts))


def obey(what: str, data: Any, rules: dict[str, Rule]) -> None:
    """Hold an object against rules; ValueError naming the first value that breaks one. A key may be absent: whoever
    needs it says so."""
    if not isinstance(data, dict):
        raise ValueError(f"{what} is no object")
    for name, rule in rules.items():
        if name in data and not rule(data[name]):
            raise ValueError(f"{what}.{name} cannot be {str(data[name])[:80]!r}")


def check(data: Any) -> None:
    """Hold a manifest, as parsed from JSON, against every rule. Raises ValueError, KeyError or TypeError."""
    obey("manifest", data, MANIFEST)
    spec = data["spec"]
    obey("spec", spec, SPEC)
    layers = spec["layers"]
    if not isinstance(layers, list) or len(layers) > MOST_LAYERS:
        raise ValueError("spec.layers is no list of layers")
    for position, layer in enumerate(layers):
        obey(f"spec.layers[{position}]", layer, LAYER)
        if layer["num_heads"] % layer["kv_num_heads"]:
            raise ValueError(f"spec.layers[{position}]: {layer['kv_num_heads']} key/value heads do not divide "
                             f"{layer['num_heads']}")
    if len({layer["layer"] for layer in layers}) != len(layers):
        raise ValueError("spec.layers names a layer twice")
    for kind in ("inputs", "outputs"):
        for position, tensor in enumerate(data[kind]):
            obey(f"{kind}[{position}]", tensor, TENSOR)
        if len({tensor["name"] for tensor in data[kind]}) != len(data[kind]):
            raise ValueError(f"{kind} names a tensor twice")
    for position, fallback in enumerate(data["fallbacks"]):
        obey(f"fallbacks[{position}]", fallback, FALLBACK)
    for name, fact in data["files"].items():
        if not inside(name):
            raise ValueError(f"it names a file outside the bundle: {name[:80]!r}")
        obey(f"files[{name!r}]", fact, FILE)
    for name, value in data["tokens"].items():
        values = value if isinstance(value, list) else [value]
        if name in ("eos", "bos", "pad") and not all(each is None or count(0)(each) for each in values):
            raise ValueError(f"tokens.{name} cannot be {str(value)[:80]!r}")
    if data.get("engine") is not None:
        _check_engine(data["engine"])
    check_cache(data)


def _check_engine(engine: Any) -> None:
    obey("engine", engine, ENGINE)
    if not all(count(1, 10_000)(each) for each in engine["compute_capabilities"]):
        raise ValueError("engine.compute_capabilities are no capabilities")
    if not all(text(name) and text(source) for name, source in engine["aliases"].items()):
        raise ValueError("engine.aliases are no names")
    for profile in engine["profiles"]:
        obey("engine.profiles", profile, {"name": text})
        for name, shapes in profile["shapes"].items():
            if len(shapes) != 3 or not all(count(0)(size) for shape in shapes for size in shape):
                raise ValueError(f"engine.profiles: the shapes of {name[:80]!r} are no shapes")


def check_cache(data: dict[str, Any]) -> None:
    """Whether the cache tensors among inputs and outputs are those that the layers ask for."""
    dtype = DTYPES.get(data["dtype"], data["dtype"])
    for kind, prefix in (("inputs", "past_key_values"), ("outputs", "present")):
        facts = {tensor["name"]: tensor for tensor in data[kind]}
        for layer in data["spec"]["layers"] if facts else ():
            for part, size in (("key", "head_size"), ("value", "value_head_size")):
                name = f"{prefix}.{layer['layer']}.{part}"
                if name not in facts:
                    raise ValueError(f"{kind} lack {name}")
                shape, wanted = facts[name]["shape"], (layer["kv_num_heads"], layer[size])
                given = DTYPES.get(facts[name]["dtype"], facts[name]["dtype"])
                if len(shape) != 4 or (shape[1], shape[3]) != wanted or given != dtype:
                    raise ValueError(f"{name} of {kind} is {given} {shape}, the layer asks for {dtype}, heads and "
                                     f"size {list(wanted)}")
