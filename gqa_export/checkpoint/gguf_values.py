"""The values of one tensor of a GGUF file, dequantized."""

from __future__ import annotations

from math import prod
from typing import Any

from ..errors import UnsupportedModel
from .gguf_header import GgufHeader
from .quantized.gguf_tensor import stored_matrix


def read_values(header: GgufHeader, name: str, dtype: Any = "float32") -> Any:
    """A tensor as an array in torch's order of dimensions.

    Args:
        header: what `read_gguf` gave.
        name: llama.cpp's name of it.
        dtype: "float32" or "float64". Types that are kept quantized have exact values in float64, and those rounded
            once in float32; what the package gguf dequantizes has float32's digits in both.

    Raises:
        UnsupportedModel: the installed package gguf cannot dequantize its type.
    """
    import numpy as np
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    if (matrix := stored_matrix(header, name)) is not None:
        values = np.empty((matrix.rows, matrix.columns), dtype)
        for start, stop in matrix.stripes():
            values[start:stop] = matrix.dequantize(start, stop)
        return values.reshape(matrix.shape)
    kind, shape = header.tensors[name]
    path, offset = header.places[name]
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if prod(shape) == 0:
        return np.zeros(shape, dtype)
    stored = np.memmap(path, np.uint8, "r", offset, (prod(shape) // elements * size,)).view(np.ndarray)
    rows = stored.reshape(*shape[:-1], shape[-1] // elements * size) if shape else stored
    try:
        values = dequantize(rows, GGMLQuantizationType(kind))
    except NotImplementedError as error:
        raise UnsupportedModel(f"tensor {name!r} has the type {GGMLQuantizationType(kind).name}, which the installed "
                               "package gguf cannot dequantize", str(path), "upgrade gguf, or give a file of another "
                               "quantization", code="E-CKPT-GGUF-QUANTIZATION") from error
    return np.require(values, dtype, ["C", "W", "O"]).reshape(shape)  # plain floats are a view of the file

