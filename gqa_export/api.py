"""The public Python API: `import gqa_export as gqa`. The command line calls nothing else.

Importing it imports nothing heavy; each call imports what it needs. Options are keyword-only, and None means "not
given": the default of the target or of the model. Every refusal is a `GqaExportError` with a stable `code`.

Threads: functions may be called from several threads as long as no two write the same output folder; exports share
process-wide settings of transformers, so run one at a time. A `Session` belongs to one thread at a time.
Nothing is printed: progress goes to the `progress` callback (what is done, how much, of how much), the rest to
`logging`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import GqaExportError
from .objects.bundle import Bundle
from .objects.checkpoints import convert, uptrain
from .objects.choices import (
    Activations,
    Attention,
    Cache,
    Dtype,
    Flavor,
    Head,
    KvCodes,
    Level,
    Logits,
    Place,
    Provider,
    Target,
    Weights,
    WindowCaches,
    check_choices,
    check_counts,
    refuse_revision,
)
from .objects.export_options import export_options
from .objects.session import Session
from .objects.sources import opened, path_of, pickles_allowed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .compare.long_quality import LongQuality
    from .compare.verdict import Verdict
    from .describe.inspection import Inspection
    from .environment.doctor import Diagnosis
    from .exporting.dry_run import Plan
    from .exporting.long_plan import LongOptions
    from .exporting.rank_costs import RankCost
    from .progress import Progress

__all__ = ["Bundle", "Session", "build_engine", "convert", "cross_check", "doctor", "export", "inspect", "measure_long",
           "open_bundle", "plan_export", "rank_costs", "uptrain"]


def export(source: Place | PreTrainedModel, output: Place, *, target: Target = "ort", dtype: Dtype = "auto",
           cache: Cache | None = None, capacity: int | None = None, weights: Weights = "copy",
           logits: Logits | None = None, provider: Provider = "auto", revision: str | None = None,
           tokenizer: PreTrainedTokenizerBase | None = None, full_hash: bool = False, max_ram: int | str | None = None,
           text_only: bool = False, allow_pickle: bool = False, ignore_unused: bool = False, force: bool = False,
           dump_passes: Place | None = None, trace_cache: bool = True, stamping: bool = True,
           quantize: Place = "keep", activations: Activations | None = None, head: Head | None = None,
           block: int = 32, calibrate: Place | None = None, max_size: int | str | None = None,
           max_kl: float | None = None, tensor_parallel: int = 1, kv_cache: KvCodes | None = None,
           long_attention: LongOptions | None = None, lora: Sequence[Place] = (), merge_lora: Place | None = None,
           window_cache: WindowCaches = "full", prompt_chunk: int | None = None, hidden_states: bool = False,
           ragged_chunks: bool = False, progress: Progress | None = None) -> Bundle:
    """Export a decoder to ONNX. Nothing is compared yet: `Bundle.validate` does that.

    Args:
        source: checkpoint folder, hub id, .gguf file, or a transformers model in memory: then the configuration is
            the model's, and the weights are those of its `state_dict`.
        output: bundle folder to write; it appears complete or not at all.
        target: what attention becomes. dtype: number format of weights and cache; "auto" is the checkpoint's.
        cache: presents are pasts plus the new tokens, or buffers of fixed capacity; None is the target's default.
        capacity: longest sequence in tokens; None is the model's, at most 4096.
        weights: "copy" writes one file, "link" links the checkpoint's, "inplace" writes the graph beside them.
        logits: of every new token or of each row's last one; None is the target's default.
        provider: where it is to run; "auto" is CUDA if it is there.
        revision: branch, tag or commit of a hub id; None is its main branch. The manifest names the commit.
        tokenizer: of a model in memory; a checkpoint's own is found.
        full_hash: sha256 of linked weight files too. max_ram: stop rather than occupy more, in bytes or as "1GB".
        text_only: of a multimodal model the language model alone. allow_pickle: also read weights from pickle files.
        ignore_unused: tensors of the checkpoint that the model does not use are noted; otherwise they are refused.
        force: replace an earlier bundle, and an earlier dump.
        dump_passes: an empty folder for the graph after each rewriting pass, without weights.
        trace_cache: take the trace that an earlier export of this architecture kept, and keep this one; False does
            neither.
        stamping: trace two layers of each kind and copy them, where that is proved to be the same; False traces every
            layer.
        quantize: "keep" leaves quantized weights as the checkpoint stores them, "dequantize" makes floating-point
            numbers of them; "int4", "int8", for TensorRT also "fp8" and "nvfp4", or a file of rules (.toml) quantizes.
            See docs/quantization.md.
        activations: quantized products round their inputs to int8 (faster), or stay exact; "same", for TensorRT: those
            with FP8 or NVFP4 weights round them to the same type. None is int8 on a CPU, else exact.
        head: bits of head and embedding: "int8", "same" as the other matrices, or "none"; None is "int8", or chosen
            where a limit is given. block: columns that share a
            scale: 16, 32, 64, 128 or 256. calibrate: a UTF-8 text by whose
            activations errors are weighed, and from which the scales of a quantized cache are chosen.
        max_size: bytes that all files of the bundle may have, or "100MB": each matrix gets 4 or 8 bits, so that the sum
            of their errors is the least. max_kl: nats that rounding the weights may move predictions, measured on part
            of the calibration text: the smallest such choice is taken.
        tensor_parallel: devices over which a model is cut, for the TensorRT targets: a graph for each, one manifest.
        kv_cache: "int8" or "int4": the cache holds codes of so many bits; "fp8": 8-bit floats; None: numbers.
        long_attention: write a second graph for long prompts, with approximate attention, beside the exact one.
        lora: folders of LoRA adapters, as PEFT saves them, that the bundle can switch between (`Session.use_adapter`);
            without one it is the base model. merge_lora: the folder of one that becomes part of the weights.
        window_cache: "small": a layer with a window keeps window + prompt_chunk tokens in place of the capacity, where
            that is less; the cache is static then. prompt_chunk: new tokens of a sequence that one call may bring then
            (sessions cut longer prompts); None is 512.
        hidden_states: the last hidden state of every new token is an output too (`Session.hidden_states`).
        ragged_chunks: for target `ort`: rows of a batch may bring several tokens each, over a past, in one call; needs
            onnxruntime 1.32.

    Raises:
        InvalidCheckpoint, UnsupportedModel, GqaExportError: nothing is left behind then.
    """
    from .exporting.to_onnx import export_onnx

    options = export_options(target, dtype, cache, capacity, weights, logits, provider, revision, full_hash, max_ram,
                              text_only, force, path_of(dump_passes), ignore_unused, trace_cache, stamping,
                              quantize, activations, head, block, calibrate, tensor_parallel, kv_cache, long_attention,
                              lora, merge_lora, hidden_states, ragged_chunks, window_cache, prompt_chunk,
                              max_size, max_kl)
    _refuse_tokenizer(source, tokenizer)
    if not isinstance(source, str | Path):
        refuse_revision(revision, type(source).__name__, "a model in memory")
    with pickles_allowed(allow_pickle), opened(source, tokenizer, text_only=text_only) as place:
        done = export_onnx(place, output, options, progress)
    return Bundle(done.folder, done.manifest, exported=done)


def plan_export(source: Place | PreTrainedModel, output: Place | None = None, *, target: Target = "ort",
                dtype: Dtype = "auto", cache: Cache | None = None, capacity: int | None = None,
                weights: Weights = "copy", logits: Logits | None = None, provider: Provider = "auto",
                revision: str | None = None, max_ram: int | str | None = None, text_only: bool = False,
                allow_pickle: bool = False, ignore_unused: bool = False, trace_cache: bool = True,
                quantize: Place = "keep", activations: Activations | None = None, head: Head | None = None,
                block: int = 32, calibrate: Place | None = None, max_size: int | str | None = None,
                max_kl: float | None = None, tensor_parallel: int = 1, kv_cache: KvCodes | None = None,
                long_attention: LongOptions | None = None, lora: Sequence[Place] = (), merge_lora: Place | None = None,
                window_cache: WindowCaches = "full", prompt_chunk: int | None = None, hidden_states: bool = False,
                ragged_chunks: bool = False, progress: Progress | None = None) -> Plan:
    """Do all of an export but the writing: what it would write, its size, time and memory. Arguments as of `export`."""
    from .exporting.dry_run import dry_run

    options = export_options(target, dtype, cache, capacity, weights, logits, provider, revision, False, max_ram,
                              text_only, False, ignore_unused=ignore_unused, trace_cache=trace_cache,
                              quantize=quantize, activations=activations, head=head, block=block, calibrate=calibrate,
                              tensor_parallel=tensor_parallel, kv_cache=kv_cache, long=long_attention, lora=lora,
                              merge_lora=merge_lora, hidden_states=hidden_states, ragged_chunks=ragged_chunks,
                              window_cache=window_cache, prompt_chunk=prompt_chunk, max_size=max_size,
                              max_kl=max_kl)
    with pickles_allowed(allow_pickle), opened(source, text_only=text_only) as place:
        return dry_run(place, options, path_of(output), progress)


def measure_long(source: Place | PreTrainedModel, *, text: Place, lengths: Sequence[int] = (4096,),
                 long_attention: LongOptions | None = None, revision: str | None = None, allow_pickle: bool = False,
                 progress: Progress | None = None) -> LongQuality:
    """Measure what approximate attention for long prompts costs a checkpoint, without exporting it.

    Args:
        text: a file in UTF-8 to measure on, of more tokens than the longest length.
        lengths: tokens of the prompts.
        long_attention: method, layers and bounds; None is method tiles in every layer. Its `text` is not read.
    """
    from .exporting.long_plan import LongOptions, measure_options
    from .progress import silent

    if not isinstance(source, str | Path):
        refuse_revision(revision, type(source).__name__, "a model in memory")
    with pickles_allowed(allow_pickle), opened(source, None) as place:
        return measure_options(place, Path(text), tuple(lengths), long_attention or LongOptions(), revision,
                               progress or silent)


def open_bundle(folder: Place) -> Bundle:
    """A bundle that is there. Only its manifest is read; `InvalidBundle` if it has none or a damaged one."""
    from .bundle.manifest import read_manifest

    return Bundle(Path(folder), read_manifest(folder))


def build_engine(source: Place, output: Place, *, attention: Attention | None = None, dtype: Dtype = "auto",
                 capacity: int | None = None, flavor: Flavor = "auto", compute_capability: Sequence[str] = (),
                 max_batch: int = 1, max_prompt: int | None = None, timing_cache: Place | None = None,
                 strip_weights: bool = False, workspace_mb: int | None = None, revision: str | None = None,
                 allow_pickle: bool = False, force: bool = False, progress: Progress | None = None) -> Bundle:
    """Build a TensorRT engine from a bundle of a TensorRT target, or from a checkpoint, which is exported on the way.

    Args:
        source: bundle folder, or checkpoint folder, hub id or .gguf file. output: engine bundle folder to write.
        attention: the grouped-attention plugin or TensorRT's own attention; None is the bundle's, plugin for a
            checkpoint. dtype, capacity: for a checkpoint, as of `export`.
        flavor: "tensorrt" builds on the target GPU, "rtx" (TensorRT for RTX) on any machine; "auto" takes what is here.
        compute_capability: GPUs the engine is for, such as ["8.9"]; empty is the flavor's default.
        max_batch: sequences at once. max_prompt: new tokens at once; None is the capacity, at most 4096.
        timing_cache: file that TensorRT's timings are read from and added to.
        strip_weights: leave the weights out. workspace_mb: most scratch memory of a layer; None is TensorRT's choice.
        revision: branch, tag or commit of a hub id.

    Raises:
        GqaExportError and its kinds, `NotCheckedHere` where a GPU is needed and there is none; nothing is left behind.
    """
    from .bundle.manifest import MANIFEST
    from .engine.build import EngineOptions
    from .exporting.to_engine import make_engine
    from .progress import silent

    check_choices(attention=attention, dtype=dtype, flavor=flavor)
    check_counts(capacity=capacity, max_batch=max_batch, max_prompt=max_prompt, workspace_mb=workspace_mb)
    if (Path(source) / MANIFEST).is_file():
        refuse_revision(revision, source, "a bundle")
    options = EngineOptions(attention or "", dtype, capacity or 0, flavor, tuple(compute_capability), max_batch,
                            max_prompt or 0, path_of(timing_cache), strip_weights, workspace_mb or 0, force)
    with pickles_allowed(allow_pickle):
        built = make_engine(str(source), Path(output), options, progress or silent, revision)
    return Bundle(built.folder, built.manifest, built=built)


def cross_check(bundles: Sequence[Place], *, level: Level = "quick", steps: int | None = None,
                provider: Provider = "auto", as_dtype: str | None = None,
                progress: Progress | None = None) -> list[Verdict]:
    """Compare bundles of one checkpoint with one another, without PyTorch: the first is the measure of the others."""
    from .validation.cross_check import cross_check as check

    check_choices(level=level, provider=provider, as_dtype=as_dtype)
    check_counts(steps=steps)
    if len(bundles) < 2:
        raise GqaExportError(f"expected at least two bundles, got {len(bundles)}", "cross_check",
                             "compare one bundle with its checkpoint: Bundle.validate", code="E-OPTION-BUNDLES")
    return check([Path(bundle) for bundle in bundles], level=level, steps=steps or 0, provider=provider,
                 as_dtype=as_dtype, progress=progress)


def rank_costs(source: Place, tensor_parallel: int, *, revision: str | None = None,
               allow_pickle: bool = False) -> tuple[RankCost, ...]:
    """What a checkpoint costs on each of `tensor_parallel` devices: cache and weights, for it and for it as MQA and as
    MHA. No weight is read.

    Raises:
        UnsupportedModel: the model cannot be cut over so many.
    """
    from .exporting.rank_costs import rank_costs as costs

    check_counts(tensor_parallel=tensor_parallel)
    with pickles_allowed(allow_pickle):
        return costs(source, tensor_parallel, revision)


def inspect(source: Place, *, revision: str | None = None, allow_pickle: bool = False) -> Inspection:
    """The attention layers of a bundle or checkpoint and what its KV cache costs, against the same model as MHA and
    as MQA. No weight is read."""
    from .bundle.manifest import MANIFEST
    from .describe.examine import examine

    if (Path(source) / MANIFEST).is_file():
        refuse_revision(revision, source, "a bundle")
    with pickles_allowed(allow_pickle):
        return examine(source, revision=revision)


def doctor() -> Diagnosis:
    """What is installed, what can run here, what is missing and the command that installs it."""
    from .environment.doctor import diagnose

    return diagnose()


def _refuse_tokenizer(source: Place | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if tokenizer is not None and isinstance(source, str | Path):
        raise GqaExportError("a checkpoint brings its own tokenizer; one was given beside it", str(source),
                             "leave out tokenizer, or export the model in memory", code="E-OPTION-TOKENIZER")
