"""What becomes of each weight of an export that quantizes, or keeps what is quantized: plan, facts and record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.quantization import PLAIN, Quantization, QuantizedWeight
from ..errors import GqaExportError
from ..progress import Progress
from ..quantized.facts import MatrixFacts, facts_of
from ..quantized.matrix import QuantizedMatrix
from ..quantizing.floats import quantize_floats
from ..quantizing.matrices import Weight, weights_of
from ..quantizing.rtn import quantize_matrix
from ..quantizing.rules import KINDS, METHODS, Decision, decide, read_rules
from ..target_refusals import refuse_codes
from ..weights.dtypes import itemsize
from ..weights.packed import add_packed, packers_of
from ..weights.rows import rows_of
from ..weights.source_kinds import DequantizedSource
from ..weights.sources import WeightStore
from .options import ExportOptions

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint
    from ..lowering.context import Lowered
    from ..targets import Target
    from ..trace.traced import Traced

KEEP = ("keep", "dequantize")


@dataclass(frozen=True)
class Plan:
    """What is quantized, and what stays as it is.

    Attributes:
        method: as the manifest names it.
        exact: products do not round their inputs.
        matrices: name of a weight -> what is packed.
        facts: of those.
        stored: name of a weight -> what the checkpoint holds, for people.
        plain: name of a weight -> why it stays floating-point numbers.
        weights: of the model, in the order of the graph.
        calibration: sha256 of the text that weighed errors. tokens: of it that were used. importance: name of a weight
            -> how much errors of its columns count.
    """

    method: str
    exact: bool
    matrices: Mapping[str, QuantizedMatrix] = field(default_factory=dict)
    facts: Mapping[str, MatrixFacts] = field(default_factory=dict)
    stored: Mapping[str, str] = field(default_factory=dict)
    plain: Mapping[str, str] = field(default_factory=dict)
    weights: tuple[Weight, ...] = ()
    calibration: str = ""
    tokens: int = 0
    importance: Mapping[str, Any] = field(default_factory=dict)


def check_options(options: ExportOptions, target: Target) -> None:
    """Refuse a value of `--quantize` that is neither a method nor a file, or whose codes the target does not hold.

    Raises:
        GqaExportError: with the methods; or a calibration text is given and nothing is quantized.
    """
    if options.quantize in KINDS:
        refuse_codes(target, KINDS[options.quantize])
    known = (*KEEP, *METHODS)
    if options.calibrate is not None and options.quantize in KEEP and not options.kv_cache:
        raise GqaExportError("a calibration text chooses scales, and nothing is quantized", "--calibrate",
                             f"add --quantize {' or '.join(METHODS)}", code="E-OPTION-CALIBRATE")
    if options.quantize not in known and not options.quantize.endswith(".toml"):
        raise GqaExportError(f"unknown quantization {options.quantize!r}", "--quantize",
                             f"use {', '.join(known)}, or a file of rules that ends in .toml",
                             code="E-OPTION-QUANTIZE")


def plan(checkpoint: Checkpoint, traced: Traced, store: WeightStore, options: ExportOptions, target: Target,
         provider: str, say: Progress) -> Plan | None:
    """What becomes of every weight; None where all stay floating-point numbers and were.

    Args:
        checkpoint: for the calibration text to run through.
        traced: the canonical model.
        store: where its weights are.
        options: of the export.
        target: the row of the target.
        provider: "cpu" or "cuda".
        say: progress.
    """
    exact = options.activations == "exact" if options.activations else \
        provider != "cpu" or not target.runs_in_onnxruntime
    weights = tuple(weights_of(traced.model))
    sources = {weight.name: store.sources_of(weight.name)[0] for weight in weights}
    held = {name: source.matrix for name, source in sources.items() if isinstance(source, DequantizedSource)}
    stored = {name: held[name].label if name in held else source.dtype for name, source in sources.items()}
    stored.update((name, label) for name, label in store.left.items() if name in stored)
    if options.quantize == "dequantize":
        return Plan("dequantize", True, stored=stored, plain=dict.fromkeys([*held, *store.left],
                                                                           "--quantize dequantize"),
                    weights=weights) if held or store.left else None
    if options.quantize == "keep":
        stacks = {weight.name for weight in weights if weight.experts}
        kept = {name: matrix for name, matrix in held.items() if name in stacks or not matrix.transposed
                or matrix.kind in target.float_codes}
        plain = {name: "it is stored with its axes exchanged" for name in held if name not in kept}
        plain |= dict.fromkeys(store.left, "its parts are stored in forms that are not one, or merged in another way")
        return Plan("keep", exact, kept, {name: facts_of(matrix) for name, matrix in kept.items()}, stored, plain,
                    weights) if held or store.left else None
    rules = read_rules(Path(options.quantize)) if options.quantize not in METHODS else ()
    decisions = decide(weights, METHODS.get(options.quantize, 0), options.block, options.head, rules,
                       KINDS.get(options.quantize, "int"))
    for kind in sorted({each.kind for each in decisions}):
        refuse_codes(target, kind)
    importance, sha256, tokens = _importance(checkpoint, options, decisions, say)
    matrices = {}
    for each in decisions:
        if each.bits:
            name, shape = each.weight.name, each.weight.matrix_shape
            label, stack = f"{name} ({stored[name]})", shape if each.weight.experts else ()
            read = rows_of(sources[name], stack, transposed=each.weight.transposed)
            if each.kind == "int":
                matrices[name] = quantize_matrix(read, shape, each.bits, each.block, label, importance.get(name),
                                                 each.bits == 8 and target.positive_scales,
                                                 transposed=each.weight.transposed)
                continue
            say(f"reading {name}", len(matrices), len(decisions))
            matrices[name] = quantize_floats(read, (shape[0], shape[1]), each.kind, each.block, label,
                                             importance.get(name))
    return Plan("rules" if rules else options.quantize, exact, matrices,
                {name: facts_of(matrix, lossless=False) for name, matrix in matrices.items()}, stored,
                {each.weight.name: each.reason for each in decisions if not each.bits}, weights, sha256, tokens,
                importance)


def _importance(checkpoint: Checkpoint, options: ExportOptions, decisions: Sequence[Decision],
                say: Progress) -> tuple[Mapping[str, Any], str, int]:
    """How much errors of each matrix's columns count, the text's sha256 and its tokens; nothing without a text."""
    if options.calibrate is None:
        return {}, "", 0
    from ..quantizing.calibrate import calibrate

    found = calibrate(checkpoint, options.calibrate, {each.weight.name for each in decisions if each.bits}, say)
    return found.importance, found.sha256, found.tokens


def fill(plan: Plan, lowered: Lowered, store: WeightStore) -> None:
    """Make the packed parts that a lowered graph reads known to the store of weights."""
    add_packed(store, plan.matrices, {name: held.parts for name, held in lowered.held.items()})


def record(plan: Plan, lowered: Lowered, dtype: str) -> Quantization:
    """What the manifest says. dtype: of the graph's floating-point numbers."""
    weights = []
    for weight in plan.weights:
        held = lowered.held.get(weight.name)
        count = 1
        for size in weight.shape:
            count *= size
        entry = QuantizedWeight(weight.name, plan.stored[weight.name], 8 * itemsize(dtype), 0, True, PLAIN,
                                count * itemsize(dtype), held.reason if held else plan.plain.get(weight.name, ""))
        if held is not None and held.forms:
            form = held.forms[0]
            size = sum(packer.nbytes(part) for _, packer, part in packers_of(plan.matrices[weight.name], held.parts))
            entry = replace(entry, bits=form.bits, block=form.block, bytes=size, reason="", kind=form.kind,
                            experts=weight.experts, transposed=weight.transposed,
                            lossless=plan.facts[weight.name].lossless and (
                                form.half or dtype == "float32" or form.kind != "int"),
                            operator=", ".join(dict.fromkeys(each.operator for each in held.forms)))
        weights.append(entry)
    return Quantization(plan.method, "exact" if plan.exact else "int8", tuple(weights), plan.calibration,
                        plan.tokens)
