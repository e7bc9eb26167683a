"""From the arguments of the public API to the options of an export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import GqaExportError
from .choices import (
    Activations,
    Cache,
    Dtype,
    Head,
    KvCodes,
    Logits,
    Place,
    Provider,
    Target,
    Weights,
    WindowCaches,
    check_choices,
    check_counts,
)
from .sources import path_of

if TYPE_CHECKING:
    from ..exporting.long_plan import LongOptions
    from ..exporting.options import ExportOptions


def export_options(target: Target, dtype: Dtype, cache: Cache | None, capacity: int | None, weights: Weights,
                   logits: Logits | None, provider: Provider, revision: str | None, full_hash: bool,
                   max_ram: int | str | None, text_only: bool, force: bool,
                   dump_passes: Path | None = None, ignore_unused: bool = False,
                   trace_cache: bool = True, stamping: bool = True, quantize: Place = "keep",
                   activations: Activations | None = None, head: Head | None = None, block: int = 32,
                   calibrate: Place | None = None, tensor_parallel: int = 1,
                   kv_cache: KvCodes | None = None, long: LongOptions | None = None,
                   lora: Sequence[Place] = (), merge_lora: Place | None = None, hidden_states: bool = False,
                   ragged_chunks: bool = False, window_cache: WindowCaches = "full",
                   prompt_chunk: int | None = None, max_size: int | str | None = None,
                   max_kl: float | None = None) -> ExportOptions:
    """The options of an export from the arguments of `gqa_export.export`; a value that is not one is refused."""
    from ..exporting.options import ExportOptions
    from ..weights.memory_budget import parse_size

    check_choices(target=target, dtype=dtype, cache=cache, weights=weights, logits=logits, provider=provider,
                  activations=activations, head=head, block=block, kv_cache=kv_cache, window_cache=window_cache)
    check_counts(capacity=capacity, tensor_parallel=tensor_parallel, prompt_chunk=prompt_chunk)
    most = parse_size(max_ram) if isinstance(max_ram, str) else max_ram or 0
    return ExportOptions(target, dtype, cache or "", capacity or 0, weights, logits or "", provider, force, full_hash,
                         most, text_only, revision, dump_passes, ignore_unused, trace_cache, stamping, str(quantize),
                         activations or "", head or "", block, path_of(calibrate), tensor_parallel, kv_cache or "",
                         long, hidden_states, ragged_chunks, tuple(map(Path, lora)), path_of(merge_lora), window_cache,
                         prompt_chunk or 0, _max_size(max_size), max_kl)


def _max_size(given: int | str | None) -> int:
    """Bytes of a limit of a bundle's size; 0: none is given."""
    from ..weights.memory_budget import bytes_of

    if given is None:
        return 0
    size = bytes_of(given) if isinstance(given, str) else int(given)
    if not size or size < 0:
        raise GqaExportError(f"invalid size {given!r}", "--max-size", "write it like 100MB, 1.5GB or 800MiB",
                             code="E-OPTION-MAX-SIZE")
    return size
