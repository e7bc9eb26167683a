"""Which layers of a model are approximated, and how: from the options of an export to a plan its model can hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import GqaExportError
from ..long_attention_op import DEFAULTS, LongPlan, LongSetting
from ..spec import ModelSpec
from ..targets import layers_label

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint
    from ..compare.long_quality import LongQuality
    from ..progress import Progress

FROM_LEAVES = 4
"""leaves of a prompt from which approximating pays, measured in docs/benchmarks/long_attention.md"""


@dataclass(frozen=True)
class LongOptions:
    """What `--long-attention` and the options beside it say.

    Attributes:
        method: "tiles" or "hyper".
        layers: "all", "last:N", numbers such as "0-9,20-29", or "auto": as many as the bounds allow.
        leaf, heavy, samples, anchors: of the op; None is the method's default.
        seed: of the tables.
        from_tokens: sequences up to this long are exact; None is four leaves.
        text: a file that the quality is measured on; needed for "auto".
        max_loss: nats per token that may be lost on the text.
        min_copy: share of the exact model's gain on a repeated passage that must be left.
    """

    method: str = "tiles"
    layers: str = "all"
    leaf: int | None = None
    heavy: int | None = None
    samples: int | None = None
    anchors: int | None = None
    seed: int = 0
    from_tokens: int | None = None
    text: Path | None = None
    max_loss: float = 0.05
    min_copy: float = 0.9

    def setting(self) -> LongSetting:
        """The op's own attributes.

        Raises:
            GqaExportError: the method is unknown.
        """
        if self.method not in DEFAULTS:
            raise GqaExportError(f"unknown method {self.method!r}", "--long-attention",
                                 f"use one of {', '.join(DEFAULTS)}", code="E-OPTION-LONG")
        usual = DEFAULTS[self.method]

        def or_usual(given: int | None, value: int) -> int:
            return value if given is None else given

        setting = replace(usual, leaf=or_usual(self.leaf, usual.leaf),
                          heavy_keys=or_usual(self.heavy, usual.heavy_keys),
                          samples=or_usual(self.samples, usual.samples), anchors=or_usual(self.anchors, usual.anchors))
        if self.anchors is None:
            setting = replace(setting, anchors=min(setting.anchors, setting.leaf))
        return replace(setting, tile=min(setting.tile, setting.leaf), block=math.gcd(setting.block, setting.leaf),
                       score_rows=min(setting.score_rows, setting.tile, setting.leaf))


def long_plan(options: LongOptions, spec: ModelSpec, capacity: int,
              automatic: Callable[[LongSetting], tuple[int, ...]], *, inside: bool = False) -> LongPlan:
    """The plan for a model.

    Args:
        options: of the export.
        spec: of the model.
        capacity: tokens of its cache.
        automatic: chooses layers by measurement.
        inside: the attention op of one graph approximates, wherever a sequence is longer than a leaf: no call of it
            can be exact for other reasons than its own few tokens.

    Raises:
        GqaExportError: the op does not take the setting, no layer is left, or no prompt would be long enough.
    """
    setting = options.setting()
    _refuse(setting.problems(capacity), "--long-leaf, --long-heavy, --long-samples, --long-anchors")
    from_tokens = options.from_tokens or (1 if inside else FROM_LEAVES) * setting.leaf
    if inside and from_tokens != setting.leaf:
        raise GqaExportError("an engine has one graph, which approximates wherever a sequence is longer than a leaf of "
                             f"{setting.leaf} tokens, and --long-from is {from_tokens}", "--long-from",
                             f"leave out --long-from, or use --long-leaf {from_tokens}", code="E-OPTION-LONG")
    if capacity <= from_tokens:
        raise GqaExportError(f"the capacity is {capacity} tokens, and prompts are approximated from {from_tokens} "
                             "tokens on: the graph for long prompts would never run", "--capacity",
                             f"use --capacity {2 * from_tokens} or another number above {from_tokens}, a smaller "
                             "--long-leaf, or leave out --long-attention", code="E-OPTION-LONG")
    if options.layers == "auto":
        layers = automatic(setting)
    else:
        layers = chosen_layers(options.layers, spec)
    plan = LongPlan(setting, layers, options.seed, from_tokens)
    _refuse(plan.problems(spec.layers, capacity), "--long-layers")
    return plan


def can_be_long(spec: ModelSpec) -> tuple[int, ...]:
    """The layers that see all tokens before: those with a window or chunks are linear as they are."""
    return tuple(layer.layer for layer in spec.layers if not layer.edges)


def chosen_layers(words: str, spec: ModelSpec) -> tuple[int, ...]:
    """The layers that "all", "last:N" or a list of numbers and ranges names, in order.

    Raises:
        GqaExportError: it is not one of these, or names no layer that sees all tokens.
    """
    able = can_be_long(spec)
    if words == "all":
        found = able
    elif words.startswith("last:") and words[5:].isdecimal() and int(words[5:]):
        found = tuple(layer for layer in able if layer >= spec.depth - int(words[5:]))
    else:
        found = _listed(words)
    if not found:
        raise GqaExportError(f"{words!r} names no layer that sees all tokens", "--long-layers",
                             f"the model has {layers_label(able)} of that kind" if able else
                             "leave out --long-attention: every layer has a window or chunks", code="E-OPTION-LONG")
    return found


def _listed(words: str) -> tuple[int, ...]:
    found: set[int] = set()
    for part in words.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(first) > 5 or len(last) > 5:
            raise GqaExportError(f"{words!r} does not name layers", "--long-layers",
                                 'use all, last:14, numbers and ranges such as "0-9,20-29", or auto',
                                 code="E-OPTION-LONG")
        found.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))


def _refuse(problems: list[str], where: str) -> None:
    if problems:
        raise GqaExportError("attention cannot be approximated so: " + "; ".join(problems), where,
                             "docs/long-context.md lists what each option takes", code="E-OPTION-LONG")


def plan_notes(plan: LongPlan, spec: ModelSpec, inside: bool = False) -> list[str]:
    """What a user must know of a plan. inside: as of `long_plan`."""
    exact = [layer.layer for layer in spec.layers if layer.edges]
    rest = "an engine is built of it; model.onnx is exact" if inside else ("model.onnx is exact and runs everything "
                                                                           "else")
    notes = [f"prefill.onnx approximates {layers_label(plan.layers)} by method {plan.setting.method} in calls of more "
             f"than {plan.setting.exact_steps} tokens that reach beyond {plan.from_tokens} tokens; {rest}. Measure "
             "what it costs: gqa-export long CHECKPOINT --text FILE"]
    if exact:
        notes.append(f"{layers_label(exact)} stay exact: their window or chunks make them linear")
    return notes


def measure_options(source: str | Path | Checkpoint, text: Path, lengths: tuple[int, ...], options: LongOptions,
                    revision: str | None, report: Progress) -> LongQuality:
    """What the options of an export would cost a checkpoint; see `gqa_export.long_context.report.measure_quality`."""
    from ..checkpoint.open import open_checkpoint
    from ..long_context.choose import choose_layers
    from ..long_context.report import measure_quality

    setting = options.setting()
    _refuse(setting.problems(max(lengths, default=0)), "--long-leaf, --long-heavy, --long-samples, --long-anchors")
    checkpoint = open_checkpoint(source, revision=revision) if isinstance(source, str | Path) else source

    def layers(spec: ModelSpec) -> tuple[int, ...]:
        if options.layers == "auto":
            return choose_layers(checkpoint, text, spec, setting, options.seed, max_loss=options.max_loss,
                                 min_copy=options.min_copy, report=report).layers
        found = chosen_layers(options.layers, spec)
        _refuse(LongPlan(setting, found, options.seed).problems(spec.layers, 0), "--long-layers")
        return found

    return measure_quality(checkpoint, text, lengths, setting, layers, seed=options.seed, max_loss=options.max_loss,
                           min_copy=options.min_copy, report=report)
