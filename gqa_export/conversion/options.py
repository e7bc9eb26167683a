"""What a conversion is asked for, and the number of key/value heads that comes of it. Refusals before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import GqaExportError
from .pooling import METHODS
from .structure import Structure
from .weight_error import LayerError

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint

AUTO = "auto"


@dataclass(frozen=True)
class ConvertOptions:
    """What `gqa-export convert` takes. kv_heads: a number, "auto" (the fewest within max_error) or "8,8,4": one number
    a layer. max_error: largest relative error of a layer's attention output."""

    kv_heads: str = AUTO
    method: str = "mean"
    grouping: str = "contiguous"
    max_error: float | None = None
    text: Path | None = None
    tokens: int = 4096
    seed: int = 0
    force: bool = False


def check_options(checkpoint: Checkpoint, options: ConvertOptions) -> None:
    """Refuse what cannot be, from the options and the kind of checkpoint alone."""
    if checkpoint.kind == "gguf":
        raise GqaExportError("a GGUF file holds quantized or repacked weights, which are not pooled",
                             checkpoint.source, "give the original Hugging Face checkpoint folder")
    if options.method not in METHODS:
        raise GqaExportError(f"unknown method {options.method}", "--method", f"use one of {', '.join(METHODS)}")
    if options.kv_heads == AUTO and options.max_error is None:
        raise GqaExportError("--kv-heads auto needs a limit", "--max-error",
                             "pass --max-error 0.2 (relative error of a layer's attention output), or a "
                             "number of heads")
    if options.max_error is not None and options.kv_heads != AUTO:
        raise GqaExportError("--max-error belongs to --kv-heads auto", "--max-error", "leave one of them away")
    if options.method == "calibrated" and options.text is None:
        raise GqaExportError("the method calibrated measures activations, and has no text", "--text",
                             "pass --text FILE with text like what the model will read")


def candidates(source: Structure) -> list[int]:
    """Numbers of key/value heads that divide the present ones, fewer than them, in falling order."""
    most = min(source.kv_heads)
    return [count for count in range(most - 1, 0, -1) if all(heads % count == 0 for heads in source.kv_heads)]


def asked(options: ConvertOptions, source: Structure) -> tuple[int, ...] | None:
    """Key/value heads of each layer, None for "auto"; GqaExportError for numbers that cannot be."""
    if options.kv_heads == AUTO:
        if not candidates(source):
            raise GqaExportError("the model has one key/value head already", "--kv-heads auto",
                                 "there is nothing to convert")
        return None
    try:
        numbers = [int(part) for part in options.kv_heads.split(",")]
    except ValueError:
        raise GqaExportError(f"--kv-heads {options.kv_heads} is no number", "--kv-heads",
                             "give a number, one number per layer with commas, or auto") from None
    if len(numbers) not in (1, len(source.layers)):
        raise GqaExportError(f"{len(numbers)} numbers of heads for {len(source.layers)} layers", "--kv-heads",
                             "give one number, or one per layer")
    wanted = numbers * len(source.layers) if len(numbers) == 1 else numbers
    for layer, (count, now) in enumerate(zip(wanted, source.kv_heads, strict=True)):
        where = f"--kv-heads, layer {layer}"
        possible = [str(number) for number in range(1, now + 1) if now % number == 0]
        if count > now:
            raise GqaExportError(f"{count} key/value heads are more than the model has ({now})", where,
                                 f"use one of {', '.join(possible)}")
        if count < 1 or now % count:
            raise GqaExportError(f"{count} key/value heads do not divide the model's {now}: its {now} cannot be pooled "
                                 "into groups of one size", where, f"use one of {', '.join(possible)}")
    return tuple(wanted)


def worst(rows: Sequence[LayerError]) -> float:
    """The largest error of a layer's attention output (where that is not known, of its keys and values)."""
    return max(max(row.key, row.value) if row.output is None else row.output for row in rows)


def fewest(errors: dict[int, list[LayerError]], options: ConvertOptions, counts: Sequence[int]) -> tuple[int, ...]:
    """The fewest heads within max_error, for every layer; GqaExportError if there are none."""
    assert options.max_error is not None
    fitting = [count for count in counts if worst(errors[count]) <= options.max_error]
    if not fitting:
        best = min(counts, key=lambda count: worst(errors[count]))
        raise GqaExportError(f"no number of key/value heads keeps every layer's error within {options.max_error:g}; "
                             f"{best} heads come to {worst(errors[best]):.3g}", "--max-error",
                             "allow a larger error, use --method calibrated, or uptrain afterwards")
    return (min(fitting),) * len(errors[fitting[0]])
