"""The options of an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..weights.layout import Mode
from .long_plan import LongOptions


@dataclass(frozen=True)
class ExportOptions:
    """What `gqa-export onnx` takes. dtype: "auto" is the checkpoint's. capacity 0: min(the model's, 4096).
    cache and logits "": the target's own. max_ram: bytes this process may occupy, 0 is no limit. text_only: of a
    multimodal model the language model alone. revision: branch, tag or commit of a hub id, None is its main branch.
    dump_passes: a folder for the graph after each pass. ignore_unused: tensors of the checkpoint that the model does
    not use are noted instead of refused. trace_cache: False neither takes nor keeps a trace.
    stamping: False traces every layer, also those that are alike.
    quantize: "keep" leaves quantized weights as they are stored, "dequantize" makes floating-point numbers of them;
    a method ("int4", "int8", "fp8", "nvfp4") or a file of rules (.toml) quantizes. activations: "int8", "same" (inputs
    of products have the type of their weight, FP8 or NVFP4), "exact" or "" for the target's own. head: bits of head and
    embedding, "int8", "same" or "none"; "" is "int8", or with a limit what it leaves room for. max_size: bytes of the
    whole bundle; 0: no limit. max_kl: nats that quantized weights may move predictions, None: no limit. With either
    one, bits of each matrix are chosen. block: columns that share a scale.
    calibrate: a text by whose activations errors are weighed, and from which a quantized cache's scales are chosen.
    tensor_parallel: devices over which the model is cut; 1 is a bundle of one graph.
    kv_cache: "int8", "int4" or "fp8" codes in the cache, "" for numbers.
    window_cache: "small" keeps windowed layers' caches as rings of window + prompt_chunk slots, "full" the capacity.
    prompt_chunk: new tokens of a sequence that one call may bring then; 0 is PROMPT_CHUNK.
    long: a second graph for long prompts is written beside the exact one. lora: folders of adapters that the bundle can
    switch between. merge_lora: of one that becomes part of the weights. hidden_states: the last hidden states are an
    output too. ragged_chunks: rows of a batch may bring several tokens each, over a past, in one call; needs a newer
    runtime (`Target.ragged_chunks_need`)."""

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
    quantize: str = "keep"
    activations: str = ""
    head: str = ""
    block: int = 32
    calibrate: Path | None = None
    tensor_parallel: int = 1
    kv_cache: str = ""
    long: LongOptions | None = None
    hidden_states: bool = False
    ragged_chunks: bool = False
    lora: tuple[Path, ...] = ()
    merge_lora: Path | None = None
    window_cache: str = "full"
    prompt_chunk: int = 0
    max_size: int = 0
    max_kl: float | None = None

    @property
    def limited(self) -> bool:
        """Whether bits of each matrix are chosen within a limit."""
        return bool(self.max_size) or self.max_kl is not None
