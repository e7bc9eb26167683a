"""What a manifest says of quantized weights: matrix by matrix, what was stored, what the graph holds, what was lost."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from ..spec import FLOATS, STRICT, Limits, OneOf, Text

MOST_MATRICES = 1 << 18
LAYER = re.compile(r"\.\d+\.")
"""the number of a layer in a name"""
PLAIN = "plain"
"""operator of a matrix that the graph holds as floating-point numbers"""
KEPT = ("keep", "dequantize")
"""methods that leave a checkpoint's values as they are"""
BITS = {"int": (2, 4, 8), "e4m3": (8,), "e2m1": (4,)}
"""kind of a code -> the bits that it may have"""


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight of the model.

    Attributes:
        name: transformers' name of the parameter.
        stored: what the checkpoint holds, "GGUF Q4_1", or "float32".
        bits: of a code in the graph; those of the float type where the operator is `PLAIN`.
        block: columns of the graph that share a scale; 0 where the operator is `PLAIN`.
        lossless: the graph has the checkpoint's values to the rounding of fp32: the export quantized none of them, and
            neither they nor their scales are rounded to fp16 or bf16. Types tell it; false where they do not.
        operator: what holds it in the graph, "MatMulNBits"; `PLAIN` for floating-point numbers. Two for one matrix that
            two operators read, "MatMulNBits, GatherBlockQuantized".
        bytes: of its codes, scales, zero points and corrections.
        reason: why it is not quantized, or not as it was stored; "" otherwise.
        errors: where the bits were chosen: number of bits -> what they lose, in the search's unit.
        kind: what a code in the graph is: "int", or a number of float8 "e4m3" or float4 "e2m1".
        experts: matrices that are stacked in it; 0: it is one. Each has blocks and an operator of its own.
        transposed: blocks of such a stack lie along the last axis of the parameter but one.
        rounded_bits: of a code as the export rounded it: `bits` may be more, where the operator has none of so few. 0:
            the export did not round it to codes. Codes may be the checkpoint's own then, also beside others that a
            method or rules rounded.
        rounded_block: columns that shared a scale then: `block` may be a part of it, its scale repeated. 0 likewise.
        inputs: the type to which products with it round their inputs, that of its codes: "e4m3" or "e2m1"; "": they do
            not.
        input_scale: of all these inputs, as the graph holds it; 0 where they are not rounded.
        inputs_reason: why they are not, where the export was to round them; "" otherwise.
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
    errors: Annotated[dict[Text, Annotated[float, Limits(ge=0)]], Limits(max_length=8)] = field(default_factory=dict)
    rounded_bits: Annotated[int, Limits(ge=0, le=64)] = 0
    rounded_block: Annotated[int, Limits(ge=0, le=1 << 31)] = 0
    inputs: Annotated[str, OneOf("", "e4m3", "e2m1")] = ""
    input_scale: Annotated[float, Limits(ge=0)] = 0.0
    inputs_reason: Text = ""

    @property
    def rounding(self) -> tuple[int, int]:
        """Bits and columns of a block by which the export rounded it."""
        return self.rounded_bits or self.bits, self.rounded_block or self.block

    def kept(self, method: str) -> bool:
        """Whether its codes are the checkpoint's own. method: as of `Quantization`."""
        own = method not in KEPT and not self.rounded_bits and self.stored not in FLOATS.values()
        return self.operator != PLAIN and (method == KEPT[0] or own)

    @property
    def held(self) -> str:
        """For people: the operator, its blocks, and what of them is not as it was rounded."""
        if self.operator == PLAIN:
            return PLAIN
        bits, block = self.rounding
        return (f"{self.operator}, block {self.block}" + ("" if bits == self.bits else f", rounded to {bits} bits")
                + ("" if block == self.block else f", a scale for {block} columns")
                + ("" if self.kind == "int" else f", {self.kind}")
                + (f", inputs {self.inputs}" if self.inputs else "")
                + (f", {self.experts} experts" if self.experts else ""))

    def problem(self, method: str, activations: str) -> str:
        """What its fields cannot be together; "" where nothing is wrong. method, activations: as of `Quantization`."""
        if wrong := self._inputs_problem(activations):
            return wrong
        if self.operator == PLAIN:
            codes = self.block or self.experts or self.transposed or self.kind != "int" or any(
                (self.rounded_bits, self.rounded_block))
            return "floating-point numbers have neither blocks nor experts nor a kind of codes" if codes else ""
        if self.block < 1:
            return f"codes of {self.operator} have a block of at least 1 column, found {self.block}"
        for bits in (self.bits, self.rounding[0]):
            if bits not in BITS[self.kind]:
                return f"a code of kind {self.kind} has {' or '.join(map(str, BITS[self.kind]))} bits, found {bits}"
        if self.transposed and not self.experts:
            return "it is transposed, which stacked experts alone are, and names none"
        if self.experts and self.kind != "int" and method not in KEPT and not self.kept(method):
            return f"an export by {method} makes no {self.kind} codes of experts, found {self.experts} of them"
        return ""


    def _inputs_problem(self, activations: str) -> str:
        if not self.inputs:
            if self.input_scale:
                return f"inputs that are not rounded have no scale, found {self.input_scale:g}"
            silent = activations == "same" and self.operator != PLAIN and not self.inputs_reason
            return "activations are \"same\", its inputs are not rounded, and no reason is given" if silent else ""
        if activations != "same":
            return f"inputs are rounded to {self.inputs} only where activations are \"same\", found \"{activations}\""
        if self.operator == PLAIN or self.inputs != self.kind or self.experts:
            return f"inputs of {self.inputs} need a single matrix of such codes"
        return "" if self.input_scale else f"inputs of {self.inputs} need a scale above 0"


@dataclass(frozen=True)
class BitsSearch:
    """How bits were chosen, matrix by matrix, within a limit.

    Attributes:
        max_bytes: that all files of the bundle may have; 0: any number.
        max_kl: nats that rounding the weights may move a prediction, on average; None: any number.
        unit: of errors. "nats": of KL divergence that a matrix's rounding adds, by gradients of a text's tokens;
            "relative": part of its output's energy, or of its own, and the head's counts as often as there are layers.
        error: the sum of the matrices' errors with the bits that were chosen. least, most: with all bits, with fewest.
        higher: matrices that have the higher number of bits. open: matrices whose bits were chosen.
        kl: KL divergence of the model with rounded weights from the model without, PyTorch beside PyTorch with inputs
            of products exact, mean over `kl_tokens` tokens of the calibration text that no scale was chosen with; None:
            not measured.
        evaluations: choices whose KL divergence was measured.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    max_bytes: Annotated[int, Limits(ge=0, le=1 << 53)]
    max_kl: Annotated[float, Limits(gt=0)] | None
    unit: Annotated[str, OneOf("nats", "relative")]
    error: Annotated[float, Limits(ge=0)]
    least: Annotated[float, Limits(ge=0)]
    most: Annotated[float, Limits(ge=0)]
    higher: Annotated[int, Limits(ge=0, le=MOST_MATRICES)]
    open: Annotated[int, Limits(ge=0, le=MOST_MATRICES)]
    kl: Annotated[float, Limits(ge=0)] | None = None
    kl_tokens: Annotated[int, Limits(ge=0, le=1 << 31)] = 0
    evaluations: Annotated[int, Limits(ge=0, le=1 << 31)] = 0

    def lines(self) -> list[str]:
        """For people."""
        limits = [*([f"{self.max_bytes / 1e6:,.1f} MB for all files"] if self.max_bytes else []),
                  *([f"KL {self.max_kl:g}"] if self.max_kl is not None else [])]
        word = "expected KL" if self.unit == "nats" else "sum of errors"
        lines = [f"bits chosen by error within {' and '.join(limits)}: {self.higher} of {self.open} matrices have 8 "
                 f"bits, the others 4; {word} {self.error:.4g} (most with 8 bits {self.least:.4g}, all with 4 "
                 f"{self.most:.4g})"]
        if self.kl is not None:
            lines.append(f"measured KL {self.kl:.4g}, of the weights alone, mean over {self.kl_tokens} tokens of the "
                         f"text that no scale was chosen with; {self.evaluations} choices measured")
        return lines


@dataclass(frozen=True)
class Quantization:
    """How the weights of a bundle are quantized.

    Attributes:
        method: "keep" (as the checkpoint stores them), "int4", "int8", ... or "rules" of a file.
        activations: "int8": matrix products round their inputs to int8, block by block (accuracy level 4 of ONNX
            Runtime on a CPU); "exact": they do not (accuracy level 0); "same": those with weights of FP8 or NVFP4 round
            them to the same type, weight by weight (`QuantizedWeight.inputs`).
        weights: every quantized matrix, and those that a quantized model has as floating-point numbers.
        calibration: sha256 of the text whose activations weighed the errors; "" where none did.
        tokens: of the calibration text that were used.
        search: how the bits were chosen, where they were; None, and not in the file, where methods or rules say them.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    method: Text
    activations: Annotated[str, OneOf("int8", "exact", "same")]
    weights: Annotated[tuple[QuantizedWeight, ...], Limits(max_length=MOST_MATRICES, fail_fast=True)] = ()
    calibration: Annotated[str, Limits(pattern="^([0-9a-f]{64})?$")] = ""
    tokens: Annotated[int, Limits(ge=0, le=1 << 31)] = 0
    search: BitsSearch | None = None

    def lines(self) -> list[str]:
        """For people: the whole, then each matrix; layers that are alike in all have one line."""
        label = {"keep": "kept as stored", "dequantize": "dequantized", "rules": "quantized by rules"}
        size = sum(weight.bytes for weight in self.weights)
        inputs = {"int8": "rounded to int8", "exact": "exact", "same": "rounded to the type of their weight"}
        lines = [f"quantized weights: {label.get(self.method, f'quantized, {self.method}')}, {size / 1e6:,.1f} MB, "
                 f"inputs of products {inputs[self.activations]}"
                 + (f", scales chosen with {self.tokens} tokens of a text" if self.calibration else "")]
        lines += [f"  {line}" for line in self.search.lines()] if self.search else []
        groups: dict[tuple[str, ...], list[QuantizedWeight]] = {}
        for weight in self.weights:
            groups.setdefault((LAYER.sub(".*.", weight.name, count=1), weight.stored, str(weight.bits), weight.held,
                               "lossless" if weight.lossless else "rounded", weight.reason, weight.inputs_reason),
                              []).append(weight)
        for (name, stored, bits, held, loss, reason, inputs_reason), members in groups.items():
            count = f" ({len(members)} of them)" if len(members) > 1 else ""
            lines.append(f"  {name if len(members) > 1 else members[0].name}{count}: {stored} -> {bits} bits, {held}, "
                         f"{loss}, {sum(each.bytes for each in members):,} bytes" + (f": {reason}" if reason else "")
                         + (f"; inputs exact: {inputs_reason}" if inputs_reason else "") + _input_scales(members)
                         + _errors(members, bits, self.search.unit if self.search else ""))
        return lines


def _input_scales(members: list[QuantizedWeight]) -> str:
    """The scales of the inputs of alike matrices; "" where they are not rounded."""
    scales = sorted({f"{each.input_scale:.3g}": each.input_scale for each in members}.items(), key=lambda each: each[1])
    if not members[0].inputs:
        return ""
    return f", input scale {scales[0][0]}" + (f" to {scales[-1][0]}" if len(scales) > 1 else "")


def _errors(members: list[QuantizedWeight], bits: str, unit: str) -> str:
    """What the bits of alike matrices lose, and what the other number of bits would lose; "" where that was not
    measured."""
    said = []
    for number in sorted(members[0].errors, key=lambda number: number != bits):
        found = [(1 if unit == "nats" else 100) * each.errors[number] for each in members if number in each.errors]
        least, most = f"{min(found):.3g}", f"{max(found):.3g}"
        word = "nats" if unit == "nats" else "%"
        said.append(f"error {least}{f' to {most}' if most != least else ''} {word}" + (
            "" if number == bits else f" with {number} bits"))
    return f"; {'; '.join(said)}" if said else ""
