"""GPT-2's matrices: transformers' Conv1D has them as `[in, out]`, and packages quantize them as any other, `[out, in]`.

Source: the pack functions of GPTQModel and AutoRound, and `integrations/bitsandbytes.py` of transformers, which
transpose a Conv1D before they quantize it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ...quantized.matrix import QuantizedMatrix
from ..refusals import refuse_quantized

FAMILIES = ("gpt2", "openai-gpt")
"""model types whose layers are made of Conv1D"""
CONV1D = re.compile(r"\.(c_attn|q_attn|c_proj|c_fc)\.weight$")
TRANSPOSE = ("auto-round", "bitsandbytes", "gptq")
"""methods whose packages transpose a Conv1D"""


def as_parameters(matrices: dict[str, QuantizedMatrix], config: dict[str, Any], method: str,
                  where: str) -> dict[str, QuantizedMatrix]:
    """Quantized weights as the model has them: those of a Conv1D with their axes exchanged.

    Args:
        matrices: by name.
        config: config.json.
        method: of the quantization.
        where: the checkpoint, for the message.

    Raises:
        UnsupportedModel: one is a Conv1D in a format of which it is not known which way round it has those.
    """
    if config.get("model_type") not in FAMILIES:
        return matrices
    turned = {name: replace(matrix, transposed=True) for name, matrix in matrices.items() if CONV1D.search(name)}
    if turned and method not in TRANSPOSE:
        refuse_quantized(f"{method}: {next(iter(turned))} is a Conv1D, which is stored either way round", where)
    return {**matrices, **turned}
