"""What a manifest says of quantized weights: matrix by matrix, what was stored, what the graph holds, what was lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from ..spec import STRICT, Limits, OneOf, Text

MOST_MATRICES = 1 << 18
PLAIN = "plain"
"""operator of a matrix that the graph holds as floating-point numbers"""


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight of the model.

    Attributes:
        name: transformers' name of the parameter.
        stored: what the checkpoint holds, "GGUF Q4_1", or "float32".
        bits: of a code in the graph; those of the float type where the operator is `PLAIN`.
        block: columns of the graph that share a scale; 0 where the operator is `PLAIN`.
        lossless: the values in the graph are those of the checkpoint, to the rounding of a scale to fp32.
        operator: what holds it in the graph, "MatMulNBits"; `PLAIN` for floating-point numbers. Two for one matrix that
            two operators read, "MatMulNBits, GatherBlockQuantized".
        bytes: of its codes, scales, zero points and corrections.
        reason: why it is not quantized, or not as it was stored; "" otherwise.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: Text
    stored: Text
    bits: Annotated[int, Limits(ge=1, le=64)]
    block: Annotated[int, Limits(ge=0, le=1 << 31)]
    lossless: bool
    operator: Text
    bytes: Annotated[int, Limits(ge=0, le=1 << 53)]
    reason: Text = ""


@dataclass(frozen=True)
class Quantization:
    """How the weights of a bundle are quantized.

    Attributes:
        method: "keep" (as the checkpoint stores them), "int4", "int8", ... or "rules" of a file.
        activations: "int8": matrix products round their inputs to int8, block by block (accuracy level 4 of ONNX
            Runtime on a CPU); "exact": they do not (accuracy level 0).
        weights: every quantized matrix, and those that a quantized model has as floating-point numbers.
        calibration: sha256 of the text whose activations weighed the errors; "" where none did.
        tokens: of the calibration text that were used.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    method: Text
    activations: Annotated[str, OneOf("int8", "exact")]
    weights: Annotated[tuple[QuantizedWeight, ...], Limits(max_length=MOST_MATRICES, fail_fast=True)] = ()
    calibration: Annotated[str, Limits(pattern="^([0-9a-f]{64})?$")] = ""
    tokens: Annotated[int, Limits(ge=0, le=1 << 31)] = 0

    def counts(self) -> dict[str, tuple[int, int]]:
        """Label ("4 bits, block 32, MatMulNBits") -> matrices and their bytes, the most bytes first."""
        found: dict[str, tuple[int, int]] = {}
        for each in self.weights:
            label = f"{each.bits} bits, {each.operator}" if each.operator == PLAIN else \
                f"{each.bits} bits, block {each.block}, {each.operator}"
            number, size = found.get(label, (0, 0))
            found[label] = (number + 1, size + each.bytes)
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))
