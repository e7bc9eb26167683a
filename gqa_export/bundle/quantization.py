"""What a manifest says of quantized weights: matrix by matrix, what was stored, what the graph holds, what was lost."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from ..spec import STRICT, Limits, OneOf, Text

MOST_MATRICES = 1 << 18
_LAYER = re.compile(r"\.\d+\.")
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
        kind: what a code in the graph is: "int", or a number of float8 "e4m3" or float4 "e2m1".
        experts: matrices that are stacked in it; 0: it is one. Each has blocks and an operator of its own.
        transposed: blocks of such a stack lie along the last axis of the parameter but one.
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
    kind: Annotated[str, OneOf("int", "e4m3", "e2m1")] = "int"
    experts: Annotated[int, Limits(ge=0, le=1 << 16)] = 0
    transposed: bool = False


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

    def lines(self) -> list[str]:
        """For people: the whole, then each matrix; layers that are alike in all have one line."""
        label = {"keep": "kept as stored", "dequantize": "dequantized", "rules": "quantized by rules"}
        size = sum(weight.bytes for weight in self.weights)
        lines = [f"quantized weights: {label.get(self.method, f'quantized, {self.method}')}, {size / 1e6:,.1f} MB, "
                 f"inputs of products {'rounded to int8' if self.activations == 'int8' else 'exact'}"
                 + (f", scales chosen with {self.tokens} tokens of a text" if self.calibration else "")]
        groups: dict[tuple[str, ...], list[QuantizedWeight]] = {}
        for weight in self.weights:
            held = weight.operator if weight.operator == PLAIN else f"{weight.operator}, block {weight.block}"
            held += "" if weight.kind == "int" else f", {weight.kind}"
            held += f", {weight.experts} experts" if weight.experts else ""
            groups.setdefault((_LAYER.sub(".*.", weight.name, count=1), weight.stored, str(weight.bits), held,
                               "lossless" if weight.lossless else "rounded", weight.reason), []).append(weight)
        for (name, stored, bits, held, loss, reason), members in groups.items():
            count = f" ({len(members)} of them)" if len(members) > 1 else ""
            lines.append(f"  {name if len(members) > 1 else members[0].name}{count}: {stored} -> {bits} bits, {held}, "
                         f"{loss}, {sum(each.bytes for each in members):,} bytes" + (f": {reason}" if reason else ""))
        return lines
