"""Limits of an export within which bits are chosen: which ones can be met at all, and whether one was."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import GqaExportError

if TYPE_CHECKING:
    from ..bundle.manifest import Manifest
    from ..bundle.writer import BundleWriter
    from .options import ExportOptions

CHOICES = (4, 8)
"""bits that a matrix may have"""


def check_limits(options: ExportOptions) -> None:
    """Refuse limits that nothing can be chosen within.

    Raises:
        GqaExportError: names the option.
    """
    if not options.limited:
        return
    option = "--max-size" if options.max_size else "--max-kl"
    if options.quantize != "int4" and not options.quantize.endswith(".toml"):
        raise GqaExportError(
            f"bits are chosen between 4 and 8, and --quantize {options.quantize} leaves no choice",
            option,
            "use --quantize int4, or a file of rules: weights that no rule names are chosen",
            code="E-OPTION-LIMIT-BITS",
        )
    if options.max_size and options.weights != "copy":
        raise GqaExportError(
            f"with --weights {options.weights} the bundle holds the checkpoint's own files too, whatever the bits",
            "--max-size, --weights",
            "use --weights copy",
            code="E-OPTION-MAX-SIZE",
        )
    if options.max_kl is None:
        return
    if not (math.isfinite(options.max_kl) and options.max_kl > 0):
        raise GqaExportError(
            f"expected a number of nats above 0, got {options.max_kl:g}",
            "--max-kl",
            "give a limit such as 0.05",
            code="E-OPTION-MAX-KL",
        )
    if options.calibrate is None:
        raise GqaExportError(
            "the KL divergence is measured on a text, and there is none",
            "--max-kl",
            "give a UTF-8 file of text like the one that will be processed: --calibrate FILE",
            code="E-OPTION-MAX-KL",
        )


def refuse_larger(limit: int, writer: BundleWriter, manifest: Manifest) -> None:
    """Refuse a bundle whose files turned out larger than its limit. limit: 0 is none.

    Raises:
        GqaExportError: with both sizes.
    """
    size = (
        sum(fact.size for fact in writer.files.values())
        + len(replace(manifest, files=dict(writer.files)).to_json().encode())
        if limit
        else 0
    )
    if size > limit:
        raise GqaExportError(
            f"the bundle has {size:,} bytes, --max-size allows {limit:,}",
            "--max-size",
            "report this: the size was predicted before",
            code="E-OPTION-MAX-SIZE",
        )
