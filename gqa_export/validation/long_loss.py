"""Measures what a bundle's approximate attention costs: the report of `gqa-export long` beside the comparison.

PyTorch's model of the comparison is measured, approximated as the manifest says; that the graph computes the same is
the comparison's affair. The text is read with the bundle's tokenizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from ..bundle.manifest import Manifest
from ..compare.long_quality import LongQuality
from ..errors import GqaExportError
from ..long_context.attention import NAME, register
from ..long_context.measure import Sequence, longest_length, shortest_length
from ..long_context.report import quality_of
from ..progress import Progress
from .reference import Reference
from .suite_setting import read_text

NO_TEXT = "--text FILE measures it"


@dataclass(frozen=True)
class LongRequest:
    """What is to be measured.

    Attributes:
        text: a UTF-8 file; None: nothing is measured.
        lengths: tokens of the prompts; (): one prompt, twice as long as sequences that are exact, where the capacity
            and the text have room for it.
        max_loss, min_copy: most that may be lost, in nats per token, and the least copy score; None: no bound.
    """

    text: Path | None = None
    lengths: tuple[int, ...] = ()
    max_loss: float | None = None
    min_copy: float | None = None

    def check(self, manifest: Manifest, where: str) -> None:
        """Refuse what nothing would be held against, before the work.

        Raises:
            GqaExportError: an option without a text or without a graph for long prompts, a bound that is not a number,
                a length that the bundle has no room for.
        """
        given = [(option, value) for option, value in (("--max-loss", self.max_loss), ("--min-copy", self.min_copy),
                                                       ("--lengths", self.lengths or None)) if value is not None]
        for option, value in given:
            if manifest.long is None:
                raise GqaExportError("the bundle has no graph for long prompts, so that nothing is approximated",
                                     f"{option}, {where}", f"leave out {option}, or export with --long-attention",
                                     code="E-OPTION-LONG-LIMIT")
            if self.text is None:
                raise GqaExportError(f"{option} needs a text to measure on", option, "name one with --text FILE",
                                     code="E-OPTION-LONG-LIMIT")
            good = not isinstance(value, float) or (math.isfinite(value) and (value <= 1 if option == "--min-copy"
                                                                               else value >= 0))
            if not good:
                raise GqaExportError(f"a loss is held against a number of at least 0, a copy score against one of at "
                                     f"most 1, got {value:g}", option, "give a limit such as 0.05 nats, or 0.9 of the "
                                     "copy score", code="E-OPTION-LONG-LIMIT")
        longest = max(self.lengths, default=0)
        if longest > manifest.capacity or min(self.lengths, default=1) < 1:
            raise GqaExportError(f"lengths must be within 1..{manifest.capacity}, the bundle's capacity, got "
                                 f"{longest if longest > manifest.capacity else min(self.lengths)}", "--lengths",
                                 "give lengths such as 4096,8192", code="E-OPTION-LENGTHS")

    @property
    def bound(self) -> bool:
        """Whether something must be measured for the run to pass."""
        return bool(self.lengths) or self.max_loss is not None or self.min_copy is not None


def sequences_of(request: LongRequest, manifest: Manifest, folder: Path) -> tuple[list[Sequence], str]:
    """The prompts to measure on, and why there are none.

    Raises:
        GqaExportError: the text cannot be read, or is too short for what was asked for.
    """
    if manifest.long is None or request.text is None:
        return [], NO_TEXT
    plan, tokens = manifest.long.plan, read_text(folder, request.text)
    leaf = plan.setting.leaf
    usual = min(2 * plan.from_tokens, manifest.capacity, longest_length(len(tokens)))
    least = shortest_length(leaf)
    if usual < least and not request.bound:
        return [], (f"{usual} tokens are the longest prompt that the capacity and {request.text.name} have room for, "
                    f"{least} are needed")
    return [Sequence.of(tokens, length, leaf, str(request.text)) for length in request.lengths or (usual,)], ""


def measure_long_loss(request: LongRequest, sequences: list[Sequence], manifest: Manifest, known: Reference,
                      ran_dtype: str, report: Progress) -> LongQuality | None:
    """Measure; None without sequences.

    Args:
        request, sequences: what, on what.
        manifest: of the bundle.
        known: PyTorch, opened for the comparison. ran_dtype: fp32 is measured in fp32, whose seconds are a user's;
            other formats in the reference's, which no CPU is slow for.
        report: called with what is done.

    Raises:
        UnsupportedModel: the attention of some layers cannot be replaced.
    """
    if not sequences or manifest.long is None or request.text is None:
        return None
    register()
    session = known.eager if known.eager is not None and ran_dtype == "float32" else known.session
    with session.attending(NAME) as model:  # type: ignore[attr-defined]
        found = quality_of(model, manifest.spec, manifest.long.plan, sequences, str(request.text), str(
            manifest.source.get("checkpoint", "")), max_loss=request.max_loss, min_copy=request.min_copy,
            report=report)
    return replace(found, judge_copy=request.min_copy is not None)
