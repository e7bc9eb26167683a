"""What a target cannot hold is refused before the work, with the reason that its row has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .errors import GqaExportError, UnsupportedModel
from .spec import AttentionSpec, StateSpec
from .targets import TARGETS, Target, layers_label, reasons_against


def refuse_layers(layers: Iterable[AttentionSpec], target: Target, states: Iterable[StateSpec] = ()) -> None:
    """Refuse a model that `target` cannot hold.

    Raises:
        UnsupportedModel: a layer keeps a state of fixed size and the target has no operator for it; or the target has
            no fallback, and its attention op cannot hold some layer. Every reason is given, and the targets with the
            same interface that can hold the model.
    """
    layers, keeping = list(layers), sorted({state.layer for state in states})
    if keeping and target.states_missing:
        raise UnsupportedModel(f"target {target.name} cannot hold layers that keep a state of fixed size "
                               f"(convolution, linear attention, state space): {target.states_missing}",
                               layers_label(keeping), "use --target " + " or ".join(
                                   row.name for row in TARGETS.values() if not row.states_missing)
                               + " and ONNX Runtime", code="E-TARGET-STATES")
    reasons = [] if target.fallback else reasons_against(layers, target)
    if not reasons:
        return
    others = [row.name for row in TARGETS.values() if row.interface == target.interface
              and not any(row.cannot_hold(layer) for layer in layers)]
    unheld = [layer.layer for layer in layers if target.cannot_hold(layer)]
    fix = (f"use --target {' or '.join(others)}" if others else
           "use --target ort and ONNX Runtime: no target for TensorRT can hold this model")
    whole = [replace(layer, chunk=0) for layer in layers]
    if not any(target.cannot_hold(layer) for layer in whole):
        chunk = min(layer.chunk for layer in layers if layer.chunk)
        fix += f", or --capacity {chunk} or less: one chunk is plainly causal"
    raise UnsupportedModel(f"target {target.name} cannot hold this model: {'; '.join(reasons)}", layers_label(unheld),
                           fix, code="E-TARGET-LAYER")


def refuse_codes(target: Target, kind: str) -> None:
    """Refuse to quantize to codes of float8 or float4 where a target has no operator for them.

    Args:
        target: the row.
        kind: of the codes, "int", "e4m3" or "e2m1".

    Raises:
        GqaExportError: with the targets that hold them.
    """
    if kind != "int" and kind not in target.float_codes:
        name, instead = {"e4m3": ("FP8 (e4m3)", "int8"), "e2m1": ("NVFP4 (e2m1)", "int4")}[kind]
        raise GqaExportError(f"target {target.name} does not quantize to {name}: ONNX Runtime has no fast product with "
                             "such codes on a CPU, and integers of as many bits lose no more", "--quantize",
                             f"use --quantize {instead}, or --target "
                             + " or ".join(row.name for row in TARGETS.values() if kind in row.float_codes),
                             code="E-TARGET-CODES")


def refuse_activations(target: Target, activations: str) -> None:
    """Refuse products that round their inputs in a way that no program of the target does it.

    Args:
        target: the row.
        activations: "int8", "same", "exact", or "" for the target's own.

    Raises:
        GqaExportError: int8 of a graph that becomes an engine, or the weights' types of one that does not.
    """
    if activations == "same" and not target.input_codes:
        others = " or ".join(row.name for row in TARGETS.values() if row.input_codes)
        raise GqaExportError(f"target {target.name} does not support --activations same: ONNX Runtime has no products "
                             "of FP8 or FP4 on a CPU", "--activations",
                             f"use --activations int8 or exact, or --target {others}", code="E-TARGET-OPTION")
    if activations == "int8" and not target.runs_in_onnxruntime:
        raise GqaExportError(f"target {target.name} does not support int8 activations: ONNX Runtime's products round "
                             "their inputs on a CPU, those of an engine do not", "--activations",
                             "leave out --activations, use --activations exact, or same for inputs of the weights' "
                             "types (FP8, NVFP4)", code="E-TARGET-OPTION")


def refuse_long(target: Target) -> None:
    """Refuse approximate attention for long prompts where a target has none.

    Raises:
        GqaExportError: with the reason, and the targets that have it.
    """
    if target.long_missing:
        raise GqaExportError(f"target {target.name} does not support --long-attention: {target.long_missing}",
                             "--long-attention", "use --target " + " or ".join(
                                 row.name for row in TARGETS.values() if not row.long_missing),
                             code="E-TARGET-LONG")


def refuse_windows(target: Target) -> None:
    """Refuse caches of window + chunk slots where a target has none and nothing to fall back to.

    Raises:
        GqaExportError: with the reason, and the targets that have them.
    """
    if target.windows_missing:
        raise GqaExportError(f"target {target.name} does not support --window-cache small: {target.windows_missing}",
                             "--window-cache", "use --target " + " or ".join(
                                 row.name for row in TARGETS.values()
                                 if not row.windows_missing and not row.windows_instead), code="E-TARGET-WINDOW-CACHE")


def refuse_long_with_codes(kv_cache: str) -> None:
    """Refuse a graph for long prompts beside one whose cache holds codes: their caches are the same tensors.

    Raises:
        GqaExportError: both are wanted.
    """
    if kv_cache:
        raise GqaExportError("the op for long prompts reads numbers from the cache, not codes", "--long-attention",
                             f"leave out --kv-cache {kv_cache} or --long-attention", code="E-OPTION-LONG-CODES")


def refuse_long_with_rounding() -> None:
    """Refuse a graph for long prompts whose products would round their inputs: it is compared number by number.

    Raises:
        GqaExportError: always.
    """
    raise GqaExportError("a graph for long prompts is not written with activations that are rounded",
                         "--long-attention", "use --activations exact, or leave out --long-attention",
                         code="E-OPTION-LONG-INT8")


def refuse_ragged_chunks(target: Target, wanted: bool, long: bool) -> None:
    """Refuse chunks of several rows in one call where the target has no need of the option, or beside a graph for long
    prompts, which was not run so.

    Raises:
        GqaExportError: with the reason.
    """
    if wanted and not target.ragged_chunks_need:
        raise GqaExportError(f"graphs of target {target.name} take chunks of several rows in one call as they are",
                             "--ragged-chunks", "leave out --ragged-chunks", code="E-TARGET-OPTION")
    if wanted and long:
        raise GqaExportError("chunks of several rows in one call were not compared with a graph for long prompts",
                             "--ragged-chunks, --long-attention", "leave out one of the two",
                             code="E-OPTION-RAGGED-CHUNKS")


def refuse_ragged_states(states: Iterable[StateSpec], wanted: bool) -> None:
    """Refuse chunks of several rows in one call for a model that keeps states.

    Raises:
        UnsupportedModel: it keeps some. The op leaves what it finds in the memory of padded tokens' answers, and
            states are computed from all tokens.
    """
    keeping = sorted({state.layer for state in states})
    if wanted and keeping:
        raise UnsupportedModel("with --ragged-chunks the attention op's answers to padded tokens are unspecified, and "
                               "states would be computed from it", layers_label(keeping), "leave out --ragged-chunks",
                               code="E-MODEL-RAGGED-CHUNKS")


def refuse_options(target: Target, cache: str, logits: str) -> None:
    """Refuse options that a target does not have, all of them at once.

    Args:
        target: the row.
        cache: "growing" or "static".
        logits: "all" or "last".

    Raises:
        GqaExportError: the target has no such cache or does not give such logits.
    """
    wrong = [(option, value, known) for option, value, known in
             (("cache", cache, target.caches), ("logits", logits, target.logits)) if value not in known]
    if wrong:
        raise GqaExportError(f"target {target.name} does not support "
                             + " and ".join(f"{value} {option}" for option, value, _ in wrong),
                             ", ".join(f"--{option}" for option, _, _ in wrong),
                             "use " + " ".join(f"--{option} {known[0]}" for option, _, known in wrong),
                             code="E-TARGET-OPTION")
