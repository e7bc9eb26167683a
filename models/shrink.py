"""Any causal-LM configuration of transformers made small: `matrix.toml` has the sizes, this module applies them.

Nothing here knows an architecture: whole numbers are replaced by name, lists with one entry a layer are cut to the
depth so that every kind of layer stays, nested configurations are made small the same way.
"""

from __future__ import annotations

import os
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

MATRIX = Path(__file__).parent / "matrix.toml"
ABOUT = ("note", "seed")
"""keys of a model's table that are not the configuration's"""
NULLABLE = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_group", "topk_group", "n_routed_experts")
"""whole numbers whose default may be None: derived from others, or unusable without a value"""


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(MATRIX.read_text(encoding="utf-8"))


def about(name: str, key: str, default: Any = None) -> Any:
    """What the table has about a model beside its configuration: its `note` or `seed`."""
    return _tables()["models"].get(name, {}).get(key, default)


def small_config(name: str, **overrides: Any) -> Any:
    """A small transformers configuration of causal-LM name `name`; `overrides` go on top of the tables."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    table = {**_tables()["models"].get(name, {}), **overrides}
    own = _nested({key: value for key, value in table.items() if key not in ABOUT})
    flat = {key: value for key, value in own.items() if not isinstance(value, dict)}
    try:
        default = AutoConfig.for_model(name)
    except Exception:  # a class without usable defaults
        default = AutoConfig.for_model(name, **own)
    values = _merge(_shrunk(default, flat.get("num_hidden_layers")), own)
    return CONFIG_MAPPING[name](**values)


def _nested(table: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in table.items():
        outer, _, inner = key.partition(".")
        if inner:
            result.setdefault(outer, {})[inner] = value
        else:
            result[key] = value
    return result


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def _shrunk(default: Any, depth: int | None = None) -> dict[str, Any]:
    """Constructor arguments that make a configuration like `default`, small."""
    sizes = _tables()["sizes"]
    depth = depth or sizes["num_hidden_layers"]
    layers = getattr(default, "num_hidden_layers", None)
    values: dict[str, Any] = {}
    for key, value in _fields(default).items():
        if isinstance(getattr(type(default), key, None), property):
            continue  # computed from the others
        if hasattr(value, "to_dict"):
            values[key] = {**_shrunk(value), "model_type": value.model_type}
        elif key in sizes and ((isinstance(value, int) and not isinstance(value, bool))
                               or (value is None and key in NULLABLE)):
            values[key] = sizes[key]
        elif isinstance(value, list | tuple) and layers and len(value) == layers and len(value) > 1:
            values[key] = _cycled(list(value), depth)
        elif key.endswith(("token_id", "token_index")) and _ids_beyond(value, sizes["vocab_size"]):
            values[key] = 2 if key.startswith("eos") else 3
    if "qk_rope_head_dim" in values and "head_dim" in values:
        values["head_dim"] = values["qk_rope_head_dim"]  # in latent attention it sizes the rotary part
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]  # and every head has its own keys
    return values


def _fields(config: Any) -> dict[str, Any]:
    renamed = getattr(config, "attribute_map", None) or {}
    found = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    return found | {key: getattr(config, key, None) for key in renamed.values() if key not in found}


def _ids_beyond(value: Any, limit: int) -> bool:
    ids = value if isinstance(value, list) else [value]
    return any(isinstance(one, int) and one >= limit for one in ids)


def _cycled(values: list[Any], depth: int) -> list[Any]:
    """Every distinct value in turn, so that the last layer is of the kind the last layer was."""
    kinds: list[Any] = []
    for value in values:
        if value not in kinds:
            kinds.append(value)
    first = (kinds.index(values[-1]) + 1 - depth) % len(kinds)
    return [kinds[(first + place) % len(kinds)] for place in range(depth)]


def write_small(name: str, folder: str | os.PathLike[str], **overrides: Any) -> Path:
    """Write a small random checkpoint of causal-LM name `name` into `folder` and return that folder."""
    from . import save_random

    return save_random(small_config(name, **overrides), folder, seed=about(name, "seed", 0))
