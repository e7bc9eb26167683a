"""Data about models: tiny test configurations (`tiny.toml`) and the function that turns one into a checkpoint."""

from __future__ import annotations

import os
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

TINY = Path(__file__).parent / "tiny.toml"
SHAPES = Path(__file__).parent / "shapes.toml"


@cache
def _tables() -> dict[str, dict[str, Any]]:
    return tomllib.loads(TINY.read_text(encoding="utf-8"))


def tiny_names() -> list[str]:
    """Names of all tiny configurations, in the order of the file."""
    return [name for name in _tables() if name != "common"]


def tiny_config(name: str) -> dict[str, Any]:
    """The configuration values of one tiny model, `base` followed; KeyError for a name that is not there."""
    table = dict(_tables()[name])
    base = table.pop("base", None)
    return {**tiny_config(base), **table} if base else table


def shape(name: str) -> dict[str, Any]:
    """The configuration values of a published model (`shapes.toml`), `model_type` included; KeyError if unknown."""
    return tomllib.loads(SHAPES.read_text(encoding="utf-8"))[name]


def write_tiny(name: str, folder: str | os.PathLike[str], *, seed: int = 0, dtype: str = "float32",
               **config_overrides: Any) -> Path:
    """Write tiny model `name` as a safetensors checkpoint into `folder` and return that folder.

    Every parameter is random and seeded: matrices large enough for attention to matter, norm weights, biases and
    sinks neither all one nor all zero, so that a dropped or exchanged one shows. `config_overrides` go to the
    configuration (`num_hidden_layers=5`). dtype: a torch dtype name. No tokenizer is written.
    """
    import transformers

    values = {**tiny_config(name), **config_overrides}
    model_class, model_type = values.pop("class", None), values.pop("model_type")
    known = transformers.AutoConfig.for_model(model_type)
    common = {key: value for key, value in _tables()["common"].items() if hasattr(known, key)}
    if "layer_types" in values and "num_hidden_layers" in config_overrides and "layer_types" not in config_overrides:
        depth = values["num_hidden_layers"]
        values["layer_types"] = (values["layer_types"] * depth)[:depth]
    config = transformers.AutoConfig.for_model(model_type, **{**common, **values})
    return save_random(config, folder, seed=seed, dtype=dtype, model_class=model_class)


def save_random(config: Any, folder: str | os.PathLike[str], *, seed: int = 0, dtype: str = "float32",
                model_class: str | None = None, faint_rows: int = 0, faint: float = 1.0) -> Path:
    """Save a model of this transformers config, every parameter random and seeded; see `write_tiny`.

    faint_rows, faint: every so many rows of the token embedding are multiplied by so much; 0 leaves all alike.
    """
    import torch
    import transformers

    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        if model_class:
            model = getattr(transformers, model_class)(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(_random_like(parameter, random))
        if faint_rows:
            model.get_input_embeddings().weight[::faint_rows] *= faint
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return Path(folder)


def _random_like(parameter, random):
    """Matrices: standard deviation 0.15, gain about 1.2 at width 64. Vectors: 0.3 around one (norm weights) or zero."""
    import torch

    noise = torch.randn(parameter.shape, generator=random)
    if parameter.ndim > 1:
        return 0.15 * noise
    return 0.3 * noise + (1.0 if bool((parameter == 1).all()) else 0.0)
