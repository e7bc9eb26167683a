"""Any causal-LM configuration of transformers made small: `matrix.toml` has the sizes, this module applies them.

Nothing here knows an architecture: whole numbers are replaced by name, lists with one entry a layer are cut to the
depth so that every kind of layer stays, nested configurations are made small the same way. Only sizes shrink: epsilons,
scales, rotary bases, softcaps and multipliers stay those of the configuration's class (`scalars` lists them), or, where
that class leaves them neutral and every published model does not, `matrix.toml` has the published ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

MATRIX = Path(__file__).parent / "matrix.toml"
ABOUT = ("note", "seed")
"""keys of a model's table that are not the configuration's"""
NULLABLE = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_group", "topk_group", "n_routed_experts")
"""whole numbers whose default may be None: derived from others, or unusable without a value"""
SCALAR = re.compile("eps|scal|multiplier|softcap|theta|factor|alpha|beta|limit|clip")
NO_SCALAR = re.compile("loss|init|dropout|layer_rope|variance|emb_scaling|init_values")
"""what a configuration's numbers are called that go into arithmetic, and those that only training or a table uses"""
FAINT_ROWS, FAINT = 8, 1e-3
"""every so many rows of the embedding are drawn so much smaller: a norm's epsilon then decides what they become, and
one that is lost or moved shows (at the usual size of a random embedding, 1e-8 would be below every tolerance)"""


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
            values[key] = {**_set_from_outside(value), **_shrunk(value), "model_type": value.model_type}
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


def _set_from_outside(inner: Any) -> dict[str, Any]:
    """What a configuration sets in one inside it against that one's own defaults, sizes aside: its rotary base, its
    epsilon, whether weights are tied."""
    try:
        plain = type(inner)()
    except Exception:  # a class without usable defaults
        return {}
    return {key: value for key, value in _fields(inner).items()
            if (isinstance(value, bool | float) or (key == "rope_parameters" and value))
            and getattr(plain, key, None) != value}


def scalars(config: Any) -> dict[str, float]:
    """The numbers of a configuration's decoder that go into arithmetic (epsilons, rotary bases, scales, softcaps), by
    name; of a nested table, such as rotary parameters by layer type, `table.name`."""
    found: dict[str, float] = {}

    def walk(table: dict[str, Any], prefix: str, inside: bool = False) -> None:
        for key, value in sorted(table.items()):
            if isinstance(value, dict) and (inside or key in ("rope_parameters", "attn_config")):
                walk(value, prefix if key == "rope_parameters" else f"{prefix}{key}.", True)
            elif (isinstance(value, int | float) and not isinstance(value, bool) and SCALAR.search(key)
                  and not NO_SCALAR.search(key)):
                found[f"{prefix}{key}"] = value

    walk(config.get_text_config(decoder=True).to_dict(), "")
    return found


def drawn(config: Any) -> str:
    """A short digest of a small configuration and of how its weights are drawn: another one is another model."""
    values = {key: value for key, value in config.to_dict().items() if key != "transformers_version"}
    text = json.dumps([values, FAINT_ROWS, FAINT], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


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
    from gqa_export.checkpoint.building import without_absent_parts

    from . import save_random

    config = small_config(name, **overrides)
    with without_absent_parts(config):
        return save_random(config, folder, seed=about(name, "seed", 0), faint_rows=FAINT_ROWS, faint=FAINT)
