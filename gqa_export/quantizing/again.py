"""The quantized matrices of a bundle, made again from the weights that they were made from: for the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..bundle.quantization import PLAIN, Quantization
from ..errors import NotCheckedHere
from .rtn import quantize_matrix

if TYPE_CHECKING:
    import torch

    from ..quantized.matrix import QuantizedMatrix


def matrices_of(module: torch.nn.Module, quantization: Quantization) -> dict[str, QuantizedMatrix]:
    """Every matrix that an export quantized, by the name of its parameter.

    Args:
        module: with the weights as the checkpoint stores them, in that type or a wider one.
        quantization: of the bundle. Its method is neither "keep" nor "dequantize".

    Raises:
        NotCheckedHere: the scales depend on a text, which the bundle does not hold.
    """
    if quantization.calibration:
        raise NotCheckedHere("the scales were chosen with a text, which the bundle does not hold",
                             f"calibration text {quantization.calibration[:12]}",
                             "compare the codes that the bundle holds", code="E-VALIDATE-CALIBRATED")
    found = {}
    for weight in quantization.weights:
        if weight.operator == PLAIN:
            continue
        values = module.get_parameter(weight.name).detach()

        def rows(start: int, stop: int, values: torch.Tensor = values) -> np.ndarray:
            return values[start:stop].float().cpu().numpy()

        found[weight.name] = quantize_matrix(rows, (values.shape[0], values.shape[1]), weight.bits, weight.block,
                                             weight.name)
    return found
