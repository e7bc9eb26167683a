"""Quantized weights by the names of the model's parameters: renamed, and experts stacked, by transformers' own rules.

transformers (5) has the experts of a layer in one parameter, and merges a checkpoint's matrices as it loads them. The
same is done here with codes, where the matrices of all experts have one form.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from ...quantized.combine import one_scale, stacked
from ...quantized.matrix import QuantizedMatrix
from ..checkpoint import Checkpoint
from ..safetensors_header import StoredTensor

if TYPE_CHECKING:
    import torch

MERGES = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
"""transformers' operations of a merge that is done here: experts are stacked, and of each its parts lie below one
another"""
NUMBER = re.compile(r"\.(\d+)\.(?!.*\.\d+\.)")
"""the last number in a name: of an expert within its layer"""
Weights = tuple[dict[str, QuantizedMatrix], dict[str, StoredTensor], dict[str, str]]


def parameters_of(checkpoint: Checkpoint, wanted: Collection[str]) -> Weights:
    """Quantized and plain weights of a quantized checkpoint by the names of the model's parameters.

    Args:
        checkpoint: with quantized weights.
        wanted: names of the model's parameters. Its structure is built (without weights) only if others are stored.

    Returns:
        Quantized weights, stored tensors, and what is quantized and merged in another way, or of matrices of different
        forms: name of the parameter -> what is stored. Of those the values alone can be had.
    """
    if checkpoint.gguf_file is not None or checkpoint.quantized.keys() <= set(wanted):
        return checkpoint.quantized, checkpoint.tensors, checkpoint.values_alone
    from ..load_model import load_skeleton

    return by_parameter(checkpoint, load_skeleton(checkpoint))


def by_parameter(checkpoint: Checkpoint, model: torch.nn.Module) -> Weights:
    """As `parameters_of`, for a model of it (on the meta device)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    state: dict[str, Any] = model.state_dict()
    matrices: dict[str, QuantizedMatrix] = {}
    plain: dict[str, StoredTensor] = {}
    merged: dict[str, dict[str, dict[int, QuantizedMatrix]]] = {}
    broken: set[str] = set()
    labels: dict[str, list[str]] = {}
    stored: dict[str, Any] = {**checkpoint.tensors, **checkpoint.quantized}
    for name, weight in stored.items():
        renamed, pattern = rename_source_key(name, renamings, converters, str(model.base_model_prefix), state)
        if renamed not in state and name in state:
            renamed, pattern = name, None
        number = NUMBER.search(name)
        if isinstance(weight, QuantizedMatrix):
            labels.setdefault(renamed, []).append(weight.label)
        if pattern is None and isinstance(weight, QuantizedMatrix):
            matrices[renamed] = weight
        elif pattern is None:
            plain[renamed] = weight
        elif isinstance(weight, QuantizedMatrix) and number is not None:
            merged.setdefault(renamed, {}).setdefault(pattern, {})[int(number[1])] = weight
        else:
            broken.add(renamed)
    for name, parts in merged.items():
        whole = _stacked(parts, converters) if name not in broken else None
        if whole is not None and name in state and whole.shape == tuple(state[name].shape):
            matrices[name] = whole
    left = {name: ", ".join(dict.fromkeys(found)) for name, found in labels.items()
            if name in state and name not in matrices}
    return matrices, plain, left


def _stacked(parts: dict[str, dict[int, QuantizedMatrix]], converters: list[Any]) -> QuantizedMatrix | None:
    """The experts of one parameter, `[E, N, K]`; parts: by the pattern of the source, then the expert's number."""
    found = next((entry for entry in converters if set(parts) <= set(entry.source_patterns)), None)
    if found is None or [(type(each).__name__, getattr(each, "dim", None)) for each in found.operations] not in MERGES:
        return None
    order = [parts.get(pattern, {}) for pattern in found.source_patterns]
    experts = range(len(order[0]))
    if any(set(each) != set(experts) for each in order):
        return None
    if not order[0] or any(len({matrix.shape for matrix in each.values()}) > 1 for each in order):
        return None
    return stacked([[one_scale(each[expert]) for each in order] for expert in experts])
