"""The options of a conversion, and the number of key/value heads that they lead to. Refusals before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import GqaExportError, UnsupportedModel
from .pooling import METHODS
from .structure import Structure
from .weight_error import LayerError

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint

AUTO = "auto"


@dataclass(frozen=True)
class ConvertOptions:
    """What `gqa-export convert` takes.

    Attributes:
        kv_heads: a number, "auto" (the fewest within max_error) or one number per layer, "8,8,4".
        method: one of `pooling.METHODS`.
        grouping: "contiguous" or "similarity".
        max_error: largest relative error of a layer's attention output, for "auto" only.
        text: the calibration text, for "calibrated" only.
        tokens: the most tokens of it that are used.
        seed: of the method "random".
        force: replace an earlier result.
        ignore_unused: note tensors that the model does not use, instead of refusing them; they are copied.
    """

    kv_heads: str = AUTO
    method: str = "mean"
    grouping: str = "contiguous"
    max_error: float | None = None
    text: Path | None = None
    tokens: int = 4096
    seed: int = 0
    force: bool = False
    ignore_unused: bool = False


def check_options(checkpoint: Checkpoint, options: ConvertOptions) -> None:
    """Raise GqaExportError for options that contradict one another, or that this kind of checkpoint cannot take."""
    if checkpoint.kind == "gguf":
        raise GqaExportError("a GGUF file holds quantized or repacked weights, which are not pooled",
                             checkpoint.source, "give the original Hugging Face checkpoint folder",
                             code="E-CONVERT-GGUF")
    if checkpoint.quantized:
        raise UnsupportedModel(f"the checkpoint is quantized ({checkpoint.quantization}), and codes are not pooled",
                               checkpoint.source, "convert the original, unquantized checkpoint",
                               code="E-MODEL-QUANTIZED")
    if options.method not in METHODS:
        raise GqaExportError(f"unknown method {options.method!r}", "--method", f"use one of {', '.join(METHODS)}",
                             code="E-CONVERT-METHOD")
    if options.kv_heads == AUTO and options.max_error is None:
        raise GqaExportError("--kv-heads auto needs a limit", "--max-error",
                             "pass --max-error 0.2 (relative error of a layer's attention output), or a "
                             "number of heads", code="E-CONVERT-NO-LIMIT")
    if options.max_error is not None and options.kv_heads != AUTO:
        raise GqaExportError("--max-error applies to --kv-heads auto only", "--max-error", "leave one of them away",
                             code="E-CONVERT-LIMIT-UNUSED")
    if options.method == "calibrated" and options.text is None:
        raise GqaExportError("the method calibrated measures activations and needs a text", "--text",
                             "pass --text FILE with text like what the model will read", code="E-CONVERT-NO-TEXT")


def candidates(source: Structure) -> list[int]:
    """Numbers of key/value heads that divide the present ones, fewer than them, in falling order."""
    most = min(source.kv_heads)
    return [count for count in range(most - 1, 0, -1) if all(heads % count == 0 for heads in source.kv_heads)]


def heads_per_layer(options: ConvertOptions, source: Structure) -> tuple[int, ...] | None:
    """Key/value heads of each layer by the option.

    Args:
        options: `kv_heads` is used.
        source: the model's structure.

    Returns:
        One number per layer; None for "auto".

    Raises:
        GqaExportError: the option is not a number, or the model's heads cannot be pooled into so many.
    """
    if options.kv_heads == AUTO:
        if not candidates(source):
            raise GqaExportError("the model already has one key/value head", "--kv-heads auto",
                                 "there is nothing to convert", code="E-CONVERT-ONE-HEAD")
        return None
    try:
        numbers = [int(part) for part in options.kv_heads.split(",")]
    except ValueError:
        raise GqaExportError(f"--kv-heads {options.kv_heads!r} is not a number", "--kv-heads",
                             "give a number, one number per layer with commas, or auto",
                             code="E-CONVERT-NOT-A-NUMBER") from None
    if len(numbers) not in (1, len(source.layers)):
        raise GqaExportError(f"{len(numbers)} numbers of heads for {len(source.layers)} layers", "--kv-heads",
                             "give one number, or one per layer", code="E-CONVERT-LAYER-COUNT")
    wanted = numbers * len(source.layers) if len(numbers) == 1 else numbers
    for layer, (count, now) in enumerate(zip(wanted, source.kv_heads, strict=True)):
        where = f"--kv-heads, layer {layer}"
        possible = [str(number) for number in range(1, now + 1) if now % number == 0]
        if count > now:
            raise GqaExportError(f"{count} key/value heads are more than the model has ({now})", where,
                                 f"use one of {', '.join(possible)}", code="E-CONVERT-TOO-MANY-HEADS")
        if count < 1 or now % count:
            raise GqaExportError(f"{count} key/value heads do not divide the model's {now}: its {now} cannot be pooled "
                                 "into groups of one size", where, f"use one of {', '.join(possible)}",
                                 code="E-CONVERT-NOT-A-DIVISOR")
    return tuple(wanted)


def worst(rows: Sequence[LayerError]) -> float:
    """The largest error of a layer's attention output (where that is not known, of its keys and values)."""
    return max(max(row.key, row.value) if row.output is None else row.output for row in rows)


def fewest(errors: dict[int, list[LayerError]], options: ConvertOptions, counts: Sequence[int]) -> tuple[int, ...]:
    """The fewest heads within max_error, for every layer; GqaExportError if no number is within it."""
    assert options.max_error is not None
    fitting = [count for count in counts if worst(errors[count]) <= options.max_error]
    if not fitting:
        best = min(counts, key=lambda count: worst(errors[count]))
        raise GqaExportError(f"no number of key/value heads keeps every layer's error within {options.max_error:g}; "
                             f"{best} heads come to {worst(errors[best]):.3g}", "--max-error",
                             "allow a larger error, use --method calibrated, or uptrain afterwards",
                             code="E-CONVERT-ERROR-LIMIT")
    return (min(fitting),) * len(errors[fitting[0]])
