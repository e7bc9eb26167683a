"""LoRA adapters as PEFT saves them: which modules they change and by what, and merging one into a model.

An adapter adds scale * B A x to a linear module's output, A of [rank, in] and B of [out, rank]; scale is alpha / rank
(alpha / sqrt(rank) with `use_rslora`). Whatever a folder holds beyond that is refused by name: it would be lost.
Source: Hu et al., 2021 (arXiv:2106.09685); huggingface/peft, `tuners/lora` and `utils/save_and_load.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GqaExportError, InvalidCheckpoint, UnsupportedModel
from ..files.read_json import read_json
from .checkpoint import Checkpoint
from .lora_adapter import LoraAdapter, LoraModule
from .safetensors_header import StoredTensor, read_header

if TYPE_CHECKING:
    import numpy as np
    import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
PART = re.compile(r"(.+)\.lora_([AB])\.weight")
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""initialisations that change the base model's weights too, which an adapter's folder does not hold"""
MERGE_IT = "merge it into the checkpoint with PEFT (merge_and_unload, save_pretrained) and export that"


def read_adapter(folder: Path | str) -> LoraAdapter:
    """Read an adapter that PEFT saved; its weights are read later.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.

    Raises:
        InvalidCheckpoint: a file is missing or damaged, or its tensors do not fit together.
        UnsupportedModel: it is not a plain LoRA; names what else it holds.
        GqaExportError: the folder's name cannot be the name of an adapter.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InvalidCheckpoint(f"the folder is not a LoRA adapter: {name} is missing", str(folder),
                                    "give the folder that PEFT's save_pretrained wrote, with safetensors",
                                    code="E-CKPT-LORA-FILES")
    name = folder.resolve().name
    if not NAME.fullmatch(name):
        raise GqaExportError(f"an adapter is named after its folder, and {name!r} cannot be the name of a file in a "
                             "bundle", str(folder), "rename the folder: letters, digits, '.', '_' and '-'",
                             code="E-OPTION-LORA-NAME")
    config = read_json(folder / CONFIG)
    _refuse_other_kinds(config, folder)
    tensors = read_header(folder / WEIGHTS)
    parts: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in tensors.items():
        found = PART.fullmatch(key.removeprefix(PREFIX))
        if found is None or not key.startswith(PREFIX):
            raise _unsupported(f"holds {key}, which is not a LoRA factor of a linear module (embeddings, "
                               "modules_to_save, DoRA's magnitudes and experts are stored so)", folder)
        parts.setdefault(found[1], {})[found[2]] = tensor
    modules = {name: _module(name, pair, config, folder) for name, pair in sorted(parts.items())}
    if not modules:
        raise InvalidCheckpoint("the adapter has no tensors", str(folder / WEIGHTS), "save it again with PEFT",
                                code="E-CKPT-LORA-TENSORS")
    return LoraAdapter(folder, name, modules)


def _refuse_other_kinds(config: Mapping[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _unsupported(f"is of PEFT's type {kind!r}, not 'LORA'", folder)
    init = str(config.get("init_lora_weights", "")).lower()
    for given, words in (
            (config.get("use_dora"), "uses DoRA (use_dora), whose weights are rescaled by a norm"),
            (config.get("modules_to_save"),
             f"replaces whole modules (modules_to_save {config.get('modules_to_save')})"),
            (config.get("bias", "none") != "none", f"trains biases (bias {config.get('bias')!r})"),
            (config.get("lora_bias"), "has a bias in its factors (lora_bias)"),
            (config.get("fan_in_fan_out"), "is for modules whose weights are stored [in, out] (fan_in_fan_out)"),
            (config.get("target_parameters"), f"changes parameters {config.get('target_parameters')}, such as experts"),
            (config.get("trainable_token_indices"), "trains rows of the embedding (trainable_token_indices)"),
            (config.get("alora_invocation_tokens"), "is an activated LoRA (alora_invocation_tokens)"),
            (config.get("megatron_config"), "is for Megatron's layers (megatron_config)"),
            (config.get("layer_replication"), "repeats layers (layer_replication)"),
            (init.startswith(CHANGES_BASE), f"was initialised by {init}, which changes the base model too")):
        if given:
            raise _unsupported(words, folder)


def _unsupported(words: str, folder: Path) -> UnsupportedModel:
    return UnsupportedModel(f"the adapter {words}", str(folder), MERGE_IT, code="E-MODEL-LORA")


def _module(name: str, pair: Mapping[str, StoredTensor], config: Mapping[str, Any], folder: Path) -> LoraModule:
    fits = len(pair) == 2 and all(len(t.shape) == 2 for t in pair.values()) \
        and pair["A"].shape[0] == pair["B"].shape[1] and pair["A"].shape[0] > 0
    rank = pair["A"].shape[0] if fits else 0
    stated = _of_pattern(config.get("rank_pattern"), name, config.get("r"))
    alpha = _of_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha"))
    good = isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and math.isfinite(alpha)
    if not fits or rank != stated or not good:
        shapes = {part: list(tensor.shape) for part, tensor in sorted(pair.items())}
        raise InvalidCheckpoint(f"the factors of {name} have shapes {shapes}; expected A [rank, in] and B [out, rank] "
                                f"of rank {stated}, and a number lora_alpha, found {alpha!r}", str(folder),
                                "adapter_config.json and the tensors must belong together: save the adapter again",
                                code="E-CKPT-LORA-TENSORS")
    return LoraModule(name, pair["A"], pair["B"],
                      float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _of_pattern(patterns: Any, name: str, otherwise: Any) -> Any:
    """The value of the first pattern that a module's name ends in, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return otherwise


def check_modules(adapter: LoraAdapter, weights: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse an adapter whose modules are not linear modules of a model.

    Args:
        adapter: as read.
        weights: shape of every weight of the model by its name.

    Raises:
        UnsupportedModel: names the modules.
    """
    unknown = [name for name in adapter.modules if f"{name}.weight" not in weights]
    if unknown:
        raise UnsupportedModel(f"the adapter changes modules that the model does not have: {', '.join(unknown[:3])}"
                               + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""), str(adapter.folder),
                               "give the checkpoint that the adapter was trained on", code="E-MODEL-LORA-MODULES")
    for name, module in adapter.modules.items():
        shape, wanted = weights[f"{name}.weight"], (module.b.shape[0], module.a.shape[1])
        if shape != wanted:
            raise UnsupportedModel(f"the adapter is for a module {name} with a weight of {list(wanted)}, and the model "
                                   f"has {list(shape)}", str(adapter.folder),
                                   "give the checkpoint that the adapter was trained on", code="E-MODEL-LORA-MODULES")


def with_adapter(checkpoint: Checkpoint, adapter: LoraAdapter) -> Checkpoint:
    """The checkpoint with an adapter merged into it, when its model is loaded or its weights are placed.

    Raises:
        GqaExportError: it is a model in memory, or stored quantized.
    """
    if checkpoint.model is not None:
        raise GqaExportError("an adapter is not merged into a model in memory", checkpoint.source,
                             "merge it with PEFT (merge_and_unload) before the export", code="E-OPTION-LORA")
    if checkpoint.quantized:
        raise GqaExportError("an adapter is not merged into weights that are stored quantized", checkpoint.source,
                             "merge it into the checkpoint from before it was quantized", code="E-OPTION-LORA")
    return replace(checkpoint, adapter=adapter)


def refuse_tied_head(adapter: LoraAdapter, tied: tuple[tuple[str, ...], ...]) -> None:
    """Refuse to merge an adapter of a head that is one tensor with the embedding: the embedding would change too.

    Raises:
        UnsupportedModel: names the module.
    """
    for name in adapter.modules:
        if any(f"{name}.weight" in group for group in tied):
            raise UnsupportedModel(f"{name} is one tensor with the embedding, which must not change with it",
                                   str(adapter.folder), "export it switchable, with --lora", code="E-MODEL-LORA-TIED")


def merged(module: LoraModule, weight: np.ndarray) -> np.ndarray:
    """A weight [out, in] with a module's part added, in fp32."""
    first, second = module.factors()
    total: np.ndarray = weight.astype("float32") + second @ first
    return total


def merge_into(model: torch.nn.Module, adapter: LoraAdapter) -> None:
    """Add an adapter to the weights of a loaded model, in place.

    Raises:
        UnsupportedModel: it does not fit the model, or changes a head that is tied to the embedding.
    """
    import torch

    from .tied_weights import tied

    parameters = dict(model.named_parameters(remove_duplicate=False))
    check_modules(adapter, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
    refuse_tied_head(adapter, tied(model))
    with torch.no_grad():
        for name, module in adapter.modules.items():
            parameter = parameters[f"{name}.weight"]
            total = merged(module, parameter.float().numpy())
            parameter.data = torch.from_numpy(total).to(parameter.dtype)
