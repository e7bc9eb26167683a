"""PyTorch with the weights that a quantized bundle is meant to hold: the plain model, its quantized matrices
dequantized in fp64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..quantized.matrix import QuantizedMatrix


def put_quantized(models: Iterable[Any], matrices: Mapping[str, QuantizedMatrix]) -> None:
    """Replace weights of models by what the matrices stand for, each in the model's own number format.

    Args:
        models: modules of transformers. Two parameters that are tied, and quantized apart, are tied no longer.
        matrices: by the parameter's name.
    """
    models = list(models)
    for model in models:
        _untie(model, matrices)
    for name, matrix in matrices.items():
        values = torch.from_numpy(matrix.parameter())
        for model in models:
            parameter = model.get_parameter(name)
            parameter.data = values.to(parameter.dtype)  # not into its memory, which may be the checkpoint's file


def _untie(model: Any, matrices: Mapping[str, QuantizedMatrix]) -> None:
    """Give every quantized parameter its own memory where it shares it with another quantized one."""
    seen: dict[int, QuantizedMatrix] = {}
    for name, matrix in matrices.items():
        parameter = model.get_parameter(name)
        known = seen.setdefault(id(parameter), matrix)
        if known is not matrix:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(parameter.detach().clone(), False))
