"""`--activations same`: which products round their inputs to the type of their weight, and by which scale: a kept
checkpoint's own, or the largest input of a calibration text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..bundle.quantization import KEPT
from ..errors import GqaExportError
from ..quantized.input_codes import NO_SCALE, InputCodes, input_codes, scale_of
from ..quantizing.rules import KINDS, METHODS

if TYPE_CHECKING:
    from ..lowering.context import Held
    from ..quantized.facts import MatrixFacts
    from ..targets import Target
    from .options import ExportOptions
    from .weight_plan import Plan

SAME = "same"
ROWS = "FP8 weights whose inputs are rounded have one scale a row: --block, or a rule's block, is not for them"
NOT_MULTIPLIED = "no product reads it as a matrix of its own"
NOT_REACHED = "no product read it when the model ran on the calibration text"


def check_same(options: ExportOptions, target: Target) -> None:
    """Refuse inputs of the weights' types where no weight will have such a type, or nothing gives their scales.

    Raises:
        GqaExportError: `--quantize` makes no codes of FP8 or FP4, or does without a text.
    """
    if options.activations != SAME:
        return
    methods = " or ".join(name for name, kind in KINDS.items() if kind in target.input_codes)
    if options.quantize == "dequantize" or (options.quantize in METHODS and options.quantize not in KINDS):
        raise GqaExportError("--activations same rounds inputs to the type of FP8 or NVFP4 weights, and --quantize "
                             f"{options.quantize} makes none of these", "--activations",
                             f"use --quantize {methods} with --calibrate TEXT, keep a checkpoint of these types, or "
                             "use --activations exact", code="E-OPTION-ACTIVATIONS")
    if options.quantize not in KEPT and options.calibrate is None:
        raise GqaExportError("inputs of products are rounded by a scale for all of them, and nothing tells how large "
                             "they are", "--activations", "give a text that is like your users' with --calibrate TEXT",
                             code="E-OPTION-ACTIVATIONS")


def with_inputs(plan: Plan | None, options: ExportOptions, target: Target, dtype: str, source: str) -> Plan | None:
    """A plan that tells how products round their inputs, or why not, of every quantized weight.

    Args:
        plan: of the weights.
        options: of the export.
        target: its row.
        dtype: number format of the graph.
        source: the checkpoint, for people.

    Raises:
        GqaExportError: no weight has codes of FP8 or FP4.
    """
    if options.activations != SAME:
        return plan
    if plan is None or not any(facts.kind in target.input_codes for facts in plan.facts.values()):
        raise GqaExportError("--activations same rounds inputs to the type of FP8 or NVFP4 weights, and no weight has "
                             "such a type", source, "use --activations exact, or quantize with --quantize fp8 or nvfp4 "
                             "and --calibrate TEXT", code="E-OPTION-ACTIVATIONS")
    scales, looked_up = scales_of(plan), {weight.name for weight in plan.weights if weight.role == "embedding"}
    found = {name: NOT_MULTIPLIED if name in looked_up else
             _codes(facts, scales.get(name), target.input_codes, dtype, _no_scale(plan, name))
             for name, facts in plan.facts.items()}
    return replace(plan, same=True, inputs={name: each for name, each in found.items() if isinstance(each, InputCodes)},
                   exact_inputs={name: each for name, each in found.items() if isinstance(each, str)})


def scales_of(plan: Plan) -> dict[str, float]:
    """The scale of each weight's inputs, where there is one."""
    if plan.method in KEPT:
        return {name: matrix.input_scale for name, matrix in plan.matrices.items() if matrix.input_scale is not None}
    return {name: scale_of(plan.largest[name], facts.kind) for name, facts in plan.facts.items()
            if name in plan.largest and facts.kind in KINDS.values()}


def _no_scale(plan: Plan, name: str) -> str:
    """Why a weight has no scale for its inputs, if it has none."""
    if plan.method not in KEPT:
        return NOT_REACHED
    return plan.matrices[name].no_input_scale or NO_SCALE


def _codes(facts: MatrixFacts, scale: float | None, kinds: Collection[str], dtype: str,
           why: str) -> InputCodes | str:
    if facts.kind != "int" and facts.kind not in kinds:
        return f"inputs of {facts.kind} are not written"
    return input_codes(facts, scale, dtype, why)


def input_notes(plan: Plan | None, held: Mapping[str, Held]) -> tuple[str, ...]:
    """A line for every reason why products with FP8 or NVFP4 weights do not round their inputs. held: how the graph
    holds each weight."""
    if plan is None or not plan.same:
        return ()
    there = [(name, held[name]) for name, facts in plan.facts.items() if facts.kind in KINDS.values() and name in held]
    reasons = Counter(plan.exact_inputs.get(name, NOT_MULTIPLIED) for name, each in there
                      if each.forms and each.inputs is None)
    rows = [ROWS] if plan.method not in KEPT and any(codes.kind == "e4m3" for codes in plan.inputs.values()) else []
    return (*rows, *(f"products with {count} of {len(there)} FP8 and NVFP4 matrices do not round their inputs: {reason}"
                 for reason, count in reasons.items()))
