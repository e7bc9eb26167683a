"""Adapters with random weights, written as PEFT writes them, and what they do to a model, by arithmetic of our own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def linear_modules(model: torch.nn.Module, endings: Sequence[str]) -> dict[str, torch.nn.Linear]:
    """Linear modules whose names end in one of these."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name.rsplit(".", 1)[-1] in endings}


def write_adapter(folder: Path, model: torch.nn.Module, endings: Sequence[str], *, rank: int = 4, alpha: float = 8,
                  seed: int = 0, dtype: torch.dtype = torch.float32, ranks: Mapping[str, int] | None = None,
                  tensors: Mapping[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """A folder as PEFT's `save_pretrained` leaves it. ranks: rank_pattern by the last part of a module's name. tensors:
    more of them. config: other entries of adapter_config.json."""
    from safetensors.torch import save_file

    random, found = torch.Generator().manual_seed(seed), {}
    for name, module in linear_modules(model, endings).items():
        size = (ranks or {}).get(name.rsplit(".", 1)[-1], rank)
        for part, shape in (("A", (size, module.in_features)), ("B", (module.out_features, size))):
            values = torch.randn(shape, generator=random) * 0.3
            found[f"base_model.model.{name}.lora_{part}.weight"] = values.to(dtype)
    folder.mkdir(parents=True)
    save_file({**found, **(tensors or {})}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(endings), "bias": "none",
        "use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "modules_to_save": None,
        "init_lora_weights": True, "rank_pattern": dict(ranks or {}), "alpha_pattern": {}, "task_type": "CAUSAL_LM",
        **config}))
    return folder


def apply_by_hooks(model: torch.nn.Module, folder: Path, scale: float) -> None:
    """Add an adapter to a model as PEFT computes it: y + scale * B(A(x)), beside the module's own product."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    for name, module in model.named_modules():
        key = f"base_model.model.{name}.lora_"
        if f"{key}A.weight" in tensors:
            first, second = (tensors[f"{key}{part}.weight"] for part in "AB")

            def add(_: Any, given: Any, answer: torch.Tensor, first: torch.Tensor = first,
                    second: torch.Tensor = second) -> torch.Tensor:
                x = given[0]
                return answer + scale * (x @ first.to(x.dtype).T) @ second.to(x.dtype).T

            module.register_forward_hook(add)
