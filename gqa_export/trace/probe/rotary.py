"""Rotary types that a fixed graph can hold. Source: transformers `modeling_rope_utils`.

`default`, `linear`, `llama3`, `yarn` and others depend on position alone. `dynamic` changes its frequencies with the
longest sequence seen, so no graph can hold it. `longrope` has two sets and picks by length: the set is fixed at
export, by the capacity.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...errors import UnsupportedModel


def rope_types(config: Any) -> list[str]:
    """The distinct rotary types that a transformers config names, in order; empty without rotary embeddings."""
    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for name, value in node.items():
                if name in ("rope_type", "type") and isinstance(value, str):
                    yield value
                elif name != "type":
                    yield from walk(value)

    found: list[str] = []
    for field in ("rope_parameters", "rope_scaling"):
        found += [kind for kind in walk(getattr(config, field, None) or {}) if kind not in found]
    return found


def check_rope(config: Any) -> None:
    """Raise UnsupportedModel for a rotary type that a fixed graph cannot hold, or that transformers does not know."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for kind in rope_types(config):
        if "dynamic" in kind:
            raise UnsupportedModel(f"rotary type `{kind}` changes its frequencies with the sequence length",
                                   "config.json: rope_parameters",
                                   "use a rotary type that depends on position alone (linear, llama3, yarn), for which "
                                   "the model has to be fine-tuned; this one cannot be exported",
                                   code="E-MODEL-ROPE-DYNAMIC")
        if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            raise UnsupportedModel(f"the installed transformers does not know the rotary type `{kind}`",
                                   "config.json: rope_parameters",
                                   f"known are: default, {', '.join(sorted(ROPE_INIT_FUNCTIONS))}; correct the "
                                   "checkpoint or install a newer transformers", code="E-MODEL-ROPE-UNKNOWN")


def freeze_regime(model: torch.nn.Module, capacity: int) -> str:
    """Fix `longrope` modules to the frequencies for sequences up to `capacity`; returns the regime or ""."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    regime = ""
    for any_module in model.modules():
        module: Any = any_module
        if getattr(module, "rope_type", None) != "longrope" or not hasattr(module, "inv_freq"):
            continue
        config = module.config
        short: int = config.rope_parameters.get("original_max_position_embeddings",
                                                getattr(config, "original_max_position_embeddings", 0) or capacity)
        regime = "long" if capacity > short else "short"
        device = module.inv_freq.device
        frequencies, scaling = ROPE_INIT_FUNCTIONS["longrope"](
            config, torch.device("cpu"), seq_len=short + 1 if regime == "long" else short)
        module.inv_freq = torch.nn.Buffer(frequencies.to(device), persistent=False)
        module.attention_scaling = scaling
        module.rope_type = "default"  # its update hook looks at this
    return regime
