"""What becomes of each weight of an export that quantizes, or keeps what is quantized: plan and record."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.quantization import PLAIN, Quantization, QuantizedWeight
from ..errors import GqaExportError
from ..progress import Progress
from ..quantized.exactness import holds, holds_type, holds_values
from ..quantized.facts import facts_of
from ..quantizing.errors_of_bits import measure
from ..quantizing.floats import quantize_floats
from ..quantizing.matrices import Weight, weights_of
from ..quantizing.rtn import quantize_matrix
from ..quantizing.rules import KINDS, METHODS, Decision, decide, read_rules
from ..target_refusals import refuse_activations, refuse_codes
from ..weights.dtypes import itemsize
from ..weights.packed import add_packed, packers_of
from ..weights.rows import rows_of
from ..weights.source_kinds import DequantizedSource
from ..weights.sources import WeightStore
from .input_scales import NOT_MULTIPLIED, SAME, check_same
from .limits import CHOICES, check_limits
from .options import ExportOptions
from .weight_plan import Plan

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint
    from ..checkpoint.safetensors_header import StoredTensor
    from ..lowering.context import Held, Lowered
    from ..quantizing.calibrate import Calibration, TextRows
    from ..targets import Target
    from ..trace.traced import Traced

KEEP = ("keep", "dequantize")
PARTS_DIFFER = "its parts are stored in forms that are not one, or merged in another way"
TYPE_ALONE = "codes of this type are not kept: its values alone are"


def check_options(options: ExportOptions, target: Target) -> None:
    """Refuse a value of `--quantize` that is neither a method nor a file, or whose codes the target does not hold.

    Raises:
        GqaExportError: with the methods that the target takes; or options are given that say how to quantize, and
            nothing is quantized, or rules say it; or products were to round their inputs in a way that the target does
            not have.
    """
    check_limits(options)
    refuse_activations(target, options.activations)
    check_same(options, target)
    methods = [method for method in METHODS if KINDS.get(method, "int") in ("int", *target.float_codes)]
    if options.quantize in KINDS:
        refuse_codes(target, KINDS[options.quantize])
    if options.calibrate is not None and options.quantize in KEEP and not options.kv_cache:
        raise GqaExportError("a calibration text chooses scales, and nothing is quantized", "--calibrate",
                             f"add --quantize {' or '.join(methods)}", code="E-OPTION-CALIBRATE")
    given = [*(["--head"] if options.head else []), *(["--block"] if options.block != ExportOptions.block else [])]
    if given and options.quantize in KEEP:
        raise GqaExportError(f"{' and '.join(given)}: how weights are quantized is given, and nothing is quantized",
                             ", ".join(given), f"add --quantize {' or '.join(methods)}, or leave out "
                             f"{' and '.join(given)}", code="E-OPTION-QUANTIZE-UNUSED")
    if options.head and options.quantize.endswith(".toml") and not options.limited:
        raise GqaExportError("a file of rules names the weights that are quantized, head and embedding too",
                             "--head", 'leave out --head, and write a rule such as match = "lm_head*", bits = 8',
                             code="E-OPTION-QUANTIZE-HEAD")
    if options.quantize not in (*KEEP, *METHODS) and not options.quantize.endswith(".toml"):
        raise GqaExportError(f"unknown quantization {options.quantize!r}", "--quantize",
                             f"use {', '.join((*KEEP, *methods))}, or a file of rules that ends in .toml",
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
    exact = options.activations != "int8" if options.activations else \
        provider != "cpu" or not target.runs_in_onnxruntime
    weights = tuple(weights_of(traced.model))
    sources = {weight.name: store.sources_of(weight.name)[0] for weight in weights}
    held = {name: source.matrix for name, source in sources.items() if isinstance(source, DequantizedSource)}
    stored = {name: held[name].label if name in held else source.dtype for name, source in sources.items()}
    stored.update((name, label) for name, label in store.left.items() if name in stored)
    codes = {**held, **dict.fromkeys(store.left)}
    if options.quantize == "dequantize":
        return Plan("dequantize", True, stored=stored, codes=codes, plain=dict.fromkeys([*held, *store.left],
                                                                           "--quantize dequantize"),
                    weights=weights) if held or store.left else None
    stacks = {weight.name for weight in weights if weight.experts}
    kept = {name: matrix for name, matrix in held.items() if name in stacks or not matrix.transposed
            or matrix.kind in target.float_codes}
    plain = {name: "it is stored with its axes exchanged" for name in held if name not in kept}
    plain |= {name: TYPE_ALONE if label.startswith("GGUF ") and " and " not in label else PARTS_DIFFER
              for name, label in store.left.items()}
    if options.quantize == "keep":
        return Plan("keep", exact, kept, {name: facts_of(matrix) for name, matrix in kept.items()}, stored, codes,
                    plain, weights) if held or store.left else None
    rules = read_rules(Path(options.quantize)) if options.quantize not in METHODS else ()
    bits = METHODS.get(options.quantize, CHOICES[0] if options.limited else 0)
    decisions = decide(weights, bits, options.block, options.head, rules, KINDS.get(options.quantize, "int"),
                       traced.tied)
    for kind in sorted({each.kind for each in decisions}):
        refuse_codes(target, kind)
    text = _text(checkpoint, options)
    known = _calibration(checkpoint, text, decisions, say)
    importance = known.importance if known else {}
    effects = _effects(checkpoint, text, decisions, importance, say) if text and options.limited else {}
    matrices, measured = {}, {}
    for number, each in enumerate(decisions):
        if not each.bits:
            continue
        name, shape = each.weight.name, each.weight.matrix_shape
        label, stack = f"{name} ({stored[name]})", shape if each.weight.experts else ()
        read = rows_of(sources[name], stack, transposed=each.weight.transposed)
        if options.limited and each.open:
            say("measuring what fewer bits lose", number, len(decisions))
            measured[name] = measure(read, shape, CHOICES, each.block, label, importance.get(name), effects.get(name),
                                     target.positive_scales, transposed=each.weight.transposed)
            matrices[name] = measured[name].quantized(CHOICES[0])
        elif each.kind == "int":
            matrices[name] = quantize_matrix(read, shape, each.bits, each.block, label, importance.get(name),
                                             each.bits == 8 and target.positive_scales,
                                             transposed=each.weight.transposed)
        else:
            say(f"reading {name}", number, len(decisions))
            # a product of FP8 on both sides has a scale a row; NVFP4 has blocks of its own
            rounds = options.activations == SAME and known and name in known.largest and each.weight.role != "embedding"
            block = shape[1] if rounds else each.block
            matrices[name] = quantize_floats(read, (shape[0], shape[1]), each.kind, block, label, importance.get(name))
    facts = {name: facts_of(matrix, lossless=False) for name, matrix in matrices.items()}
    # what is not rounded stays as it is stored, codes too
    left = {each.weight.name: plain.get(each.weight.name, each.reason) for each in decisions if not each.bits}
    kept = {name: matrix for name, matrix in kept.items() if name in left}
    return Plan("rules" if rules else options.quantize, exact, {**matrices, **kept},
                {**facts, **{name: facts_of(matrix) for name, matrix in kept.items()}}, stored, codes,
                {name: reason for name, reason in left.items() if name not in kept}, weights, measured,
                text.apart if text else None, {}, None, known.sha256 if known else "",
                known.tokens if known else 0, importance, known.largest if known else {}, kept=frozenset(kept),
                notes=_rounded_again(codes, matrices, {name: why for name, why in left.items() if name not in kept},
                                     stored))


def _rounded_again(codes: Collection[str], rounded: Collection[str], plain: Mapping[str, str],
                   stored: Mapping[str, str]) -> tuple[str, ...]:
    """What is lost of matrices that the checkpoint holds as codes. plain: name of a weight that becomes floating-point
    numbers -> why."""
    again = [name for name in rounded if name in codes]
    floats = [name for name in plain if name in codes]
    notes = []
    if again:
        labels = ", ".join(dict.fromkeys(stored[name] for name in again))
        notes.append(f"{len(again)} of {len(codes)} matrices that the checkpoint holds as codes ({labels}) are rounded "
                     f"once more and lose what that costs: {_some(again)}; --quantize keep leaves them as they are "
                     "stored")
    if floats:
        notes.append(f"{len(floats)} of {len(codes)} matrices that the checkpoint holds as codes become floating-point "
                     f"numbers: {_some(floats)}: {plain[floats[0]]}")
    return tuple(notes)


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _text(checkpoint: Checkpoint, options: ExportOptions) -> TextRows | None:
    if options.calibrate is None:
        return None
    from ..quantizing.calibrate import rows_of_text

    return rows_of_text(checkpoint, options.calibrate, hold_out=options.max_kl is not None)


def _calibration(checkpoint: Checkpoint, text: TextRows | None, decisions: Sequence[Decision],
                 say: Progress) -> Calibration | None:
    """What a text says of each matrix; None without one."""
    if text is None:
        return None
    from ..quantizing.calibrate import calibrate

    return calibrate(checkpoint, text, {each.weight.name for each in decisions if each.bits}, say)


def _effects(checkpoint: Checkpoint, text: TextRows, decisions: Sequence[Decision], importance: Mapping[str, Any],
             say: Progress) -> Mapping[str, Any]:
    """What squared errors of each matrix's outputs do to predictions."""
    from ..quantizing.sensitivity import sensitivities

    return sensitivities(checkpoint, text.statistics, {each.weight.name for each in decisions if each.open},
                         dict(importance), say)


def fill(plan: Plan, lowered: Lowered, store: WeightStore, stored: Mapping[str, StoredTensor] | None = None) -> None:
    """Make the packed parts that a lowered graph reads known to the store of weights. stored: as of `add_packed`."""
    add_packed(store, plan.matrices, {name: held.parts for name, held in lowered.held.items()}, stored)


def record(plan: Plan, lowered: Lowered, dtype: str) -> Quantization:
    """What the manifest says. dtype: of the graph's floating-point numbers."""
    weights = []
    for weight in plan.weights:
        held = lowered.held.get(weight.name)
        count = 1
        for size in weight.shape:
            count *= size
        entry = QuantizedWeight(weight.name, plan.stored[weight.name], 8 * itemsize(dtype), 0,
                                _plain(plan, weight, dtype), PLAIN, count * itemsize(dtype),
                                held.reason if held else plan.plain.get(weight.name, ""))
        if held is not None and held.forms:
            form, matrix = held.forms[0], plan.matrices[weight.name]
            size = sum(packer.nbytes(part) for _, packer, part in packers_of(matrix, held.parts))
            own = (0, 0) if plan.method in KEEP or weight.name in plan.kept else (matrix.bits, matrix.block)
            entry = replace(entry, bits=form.bits, block=form.block, bytes=size, reason="", kind=form.kind,
                            experts=weight.experts, transposed=weight.transposed,
                            rounded_bits=own[0], rounded_block=own[1],
                            lossless=plan.facts[weight.name].lossless and all(
                                holds(matrix, each, dtype) for each in held.forms),
                            operator=", ".join(dict.fromkeys(each.operator for each in held.forms)),
                            errors={str(bits): error for bits, error in plan.errors.get(weight.name, {}).items()})
        weights.append(_with_inputs(entry, plan, held) if plan.same else entry)
    activations = SAME if plan.same else "exact" if plan.exact else "int8"
    return Quantization(plan.method, activations, tuple(weights), plan.calibration,
                        plan.tokens, plan.search)


def _with_inputs(entry: QuantizedWeight, plan: Plan, held: Held | None) -> QuantizedWeight:
    """What is said of a weight, and how products with it round their inputs."""
    if entry.operator == PLAIN or held is None:
        return entry
    if held.inputs is None:
        return replace(entry, inputs_reason=plan.exact_inputs.get(entry.name, NOT_MULTIPLIED))
    return replace(entry, inputs=held.inputs.kind, input_scale=held.inputs.scale)


def _plain(plan: Plan, weight: Weight, dtype: str) -> bool:
    """Whether floating-point numbers of a format are the checkpoint's values."""
    if weight.name not in plan.codes:
        return holds_type(dtype, plan.stored[weight.name])
    matrix = plan.codes[weight.name]
    return dtype == "float32" if matrix is None else holds_values(matrix, dtype)
