"""The options of an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..weights.layout import Mode


@dataclass(frozen=True)
class ExportOptions:
    """What `gqa-export onnx` takes. dtype: "auto" is the checkpoint's. capacity 0: min(the model's, 4096).
    cache and logits "": the target's own. max_ram: bytes this process may occupy, 0 is no limit. text_only: of a
    multimodal model the language model alone. revision: branch, tag or commit of a hub id, None is its main branch.
    dump_passes: a folder for the graph after each pass. ignore_unused: tensors of the checkpoint that the model does
    not use are noted instead of refused. trace_cache: False neither takes nor keeps a trace.
    stamping: False traces every layer, also those that are alike."""

    target: str = "ort"
    dtype: str = "auto"
    cache: str = ""
    capacity: int = 0
    weights: Mode = "copy"
    logits: str = ""
    provider: str = "auto"
    force: bool = False
    hash_full: bool = False
    max_ram: int = 0
    text_only: bool = False
    revision: str | None = None
    dump_passes: Path | None = None
    ignore_unused: bool = False
    trace_cache: bool = True
    stamping: bool = True
