"""`gqa-export onnx`: export a checkpoint to an ONNX bundle and compare it with PyTorch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ..environment.machine import large_blocks_apart
from ..errors import EXIT_DIFFERENT, GqaExportError, InvalidCheckpoint, NotCheckedHere, UnsupportedModel
from .long_options import METHOD, how_options, long_options
from .trust_options import revision_option, trust_options
from .words import DTYPE, TARGET

if TYPE_CHECKING:
    from ..compare.verdict import Verdict
    from ..objects.bundle import Bundle
    from ..objects.choices import Provider


@click.command(short_help="Export a checkpoint to an ONNX decoder with a KV cache.")
@click.argument("checkpoint")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Bundle folder to write.")
@click.option("--target", type=TARGET, default="ort",
              show_default=True, help="Runtime that the graph is for; the README lists them.")
@click.option("--dtype", type=DTYPE, default="auto", show_default=True,
              help="Number format of weights and cache; auto is the checkpoint's.")
@click.option("--cache", type=click.Choice(["growing", "static"]), default=None,
              help="Present is past plus the new tokens, or a buffer of fixed capacity.  [default: the target's; "
                   "static for trt-*, else growing]")
@click.option("--capacity", type=click.IntRange(1), default=None,
              help="Longest sequence in tokens.  [default: the model's, at most 4096]")
@click.option("--weights", type=click.Choice(["copy", "link", "inplace"]), default="copy", show_default=True,
              help="Copy into one file, hard-link the checkpoint's files, or write the graph beside them.")
@click.option("--logits", type=click.Choice(["all", "last"]), default=None,
              help="Return logits of every new token, or of each row's last one.  [default: the target's; last for "
                   "trt-*, else all]")
@click.option("--provider", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
              help="Where the bundle will run; auto is CUDA if it is available.")
@click.option("--validate/--no-validate", "check", default=True, show_default=True,
              help="Compare the bundle with PyTorch after the export.")
@click.option("--hash", "hash_full", is_flag=True, help="Compute the sha256 of linked weight files too, however large.")
@click.option("--force", is_flag=True, help="Replace an earlier bundle.")
@click.option("--max-ram", default=None, metavar="SIZE", help="Memory budget (1GB): stop before more is allocated.")
@click.option("--text-only", is_flag=True, help="Export only the language model of a multimodal model, for token ids.")
@click.option("--ignore-unused", is_flag=True,
              help="Note tensors of the checkpoint that the model does not use, instead of refusing them.")
@click.option("--long-attention", type=METHOD, default=None,
              help="Write a second graph, prefill.onnx, which reads long prompts with approximate attention.")
@how_options
@click.option("--long-from", type=click.IntRange(1), default=None,
              help="Tokens up to which a sequence is read exactly.  [default: 4 leaves]")
@click.option("--text", type=click.Path(path_type=Path), default=None,
              help="Text that --long-layers auto measures on.")
@click.option("--lora", type=click.Path(path_type=Path), multiple=True, metavar="DIR",
              help="LoRA adapter (PEFT's folder) that the bundle can switch to at run time; may be repeated.")
@click.option("--merge-lora", type=click.Path(path_type=Path), metavar="DIR",
              help="LoRA adapter that becomes part of the weights.")
@click.option("--hidden-states", is_flag=True,
              help="Also return the last hidden state of every new token, for heads that draft tokens (MTP, EAGLE).")
@click.option("--ragged-chunks", is_flag=True,
              help="For ort: rows may bring several tokens each, over a past, in one call; needs onnxruntime 1.32.")
@click.option("--dump-passes", type=click.Path(path_type=Path), metavar="DIR",
              help="Write the graph after each rewriting pass to DIR, without weights.")
@click.option("--trace-cache/--no-trace-cache", default=True, show_default=True,
              help="Take the trace that an earlier export of this architecture kept, and keep this one.")
@click.option("--quantize", default="keep", show_default=True, metavar="keep|dequantize|METHOD|FILE.toml",
              help="Keep quantized weights as they are stored, make floats of them, quantize (int4, int8; for trt-* "
                   "also fp8, nvfp4), or quantize by rules of a file.")
@click.option("--activations", type=click.Choice(["int8", "exact", "same"]), default=None,
              help="Quantized products round their inputs to int8 (faster), or do not; same, for trt-*: those with FP8 "
                   "or NVFP4 weights round them to the same type.  [default: int8 on a CPU, else exact]")
@click.option("--head", type=click.Choice(["int8", "same", "none"]), default=None,
              help="With --quantize: bits of head and embedding, the same as the others', or none.  [default: int8; "
                   "chosen with --max-size, --max-kl]")
@click.option("--max-size", default=None, metavar="SIZE",
              help="With --quantize int4: most that all files of the bundle may have (100MB); bits of each matrix, 4 "
                   "or 8, are chosen by their errors.")
@click.option("--max-kl", type=float, default=None, metavar="NATS",
              help="With --quantize int4 --calibrate TEXT: most that rounding the weights may move predictions, "
                   "measured on a part of the text; the smallest such choice of bits is taken.")
@click.option("--block", type=int, default=32, show_default=True,
              help="With --quantize: columns that share a scale: 16, 32, 64, 128 or 256.")
@click.option("--tensor-parallel", type=click.IntRange(1), default=1, show_default=True, metavar="N",
              help="Cut the model over N devices: a graph for each, one manifest; for trt-native and trt-plugin.")
@click.option("--calibrate", type=click.Path(path_type=Path), default=None, metavar="TEXT",
              help="A UTF-8 text: with --quantize weighs errors by its activations, with --kv-cache chooses scales.")
@click.option("--kv-cache", type=click.Choice(["int8", "int4", "fp8"]), default=None,
              help="Hold the cache as codes of 8 or 4 bits, or 8-bit floats; needs --calibrate.")
@click.option("--window-cache", type=click.Choice(["full", "small"]), default="full", show_default=True,
              help="Let a layer with a window keep the whole capacity, or a ring of window + prompt chunk tokens.")
@click.option("--prompt-chunk", type=click.IntRange(1), default=None, metavar="N",
              help="With --window-cache small: new tokens that one call may bring; longer prompts are cut.  "
                   "[default: 512]")
@click.option("--verbose", is_flag=True, help="Print the whole table of a comparison that passed.")
@click.option("--dry-run", is_flag=True, help="Print what would be written, its size, time and memory; write nothing.")
@revision_option
@trust_options
def command(checkpoint: str, output: Path | None, check: bool, dry_run: bool, verbose: bool, provider: Provider,
            hash_full: bool, force: bool, allow_pickle: bool, revision: str | None, dump_passes: Path | None,
            long_attention: str | None, long_from: int | None, text: Path | None, **options: Any) -> None:
    """Export CHECKPOINT (a folder, a hub id or a .gguf file) to an ONNX bundle.

    If this machine cannot run the bundle's number format (bf16 on a CPU), its fp32 twin is compared.

    Exit codes: 0 exported (and passed), 1 the outputs differ from PyTorch's, 2 bad input, 3 written, but could not be
    compared here.
    """
    from .. import api
    from .progress import progress

    if options["calibrate"] is not None:
        large_blocks_apart()
    long = long_options(long_attention, options, text, long_from)
    options.update(provider=provider, revision=revision, allow_pickle=allow_pickle, long_attention=long)
    if dry_run and dump_passes:
        raise click.UsageError("--dry-run writes nothing: leave out --dump-passes.")
    if dry_run:
        with progress(f"planning the export of {checkpoint}") as bar, no_collection():
            plan = api.plan_export(checkpoint, output, progress=bar.report, **options)
        click.echo("\n".join(plan.lines()))
        return
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")

    def export(**again: bool) -> Bundle:
        with progress(f"exporting {checkpoint}") as bar, no_collection():
            bundle = api.export(checkpoint, output, full_hash=hash_full, dump_passes=dump_passes, progress=bar.report,
                                **{"force": force, **options, **again})
        describe(bundle)
        return bundle

    bundle = export()
    if check:
        gc.collect()  # what is compared next needs the memory
        raise SystemExit(_validate(bundle, checkpoint, provider, allow_pickle,
                                   lambda **options: export(force=True, **options), short=not verbose,
                                   calibrate=options["calibrate"], loras=options["lora"],
                                   merged=options["merge_lora"]))


@contextmanager
def no_collection() -> Iterator[None]:
    """No search for reference cycles meanwhile: an export makes hundreds of thousands of objects that all stay, and
    looking through them again and again costs a tenth of its time. At the end they count as old, because the first
    search among the young would look through all of them at once."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()
        gc.enable()


def describe(bundle: Bundle) -> None:
    """Print what was written, fallbacks and notes."""
    from ..targets import by_reason

    manifest, export = bundle.manifest, bundle.exported
    assert export is not None
    click.echo(f"{bundle.folder}: {manifest.target}, {manifest.dtype}, {manifest.cache} cache, capacity "
               f"{manifest.capacity}, {manifest.spec.depth} layers, {export.nodes} nodes")
    click.echo(f"  weights: {manifest.bytes_copied / 1e6:,.1f} MB written, {manifest.bytes_linked / 1e6:,.1f} MB used "
               "where they are")
    click.echo("  trace: from the trace cache" if export.trace_kept else
               f"  trace: {export.traced_layers} of {manifest.spec.depth} layers traced, the others are copies"
               if export.traced_layers < manifest.spec.depth else "  trace: every layer traced" +
               (f" ({export.whole_because})" if export.whole_because else ""))
    if manifest.parallel is not None:
        click.echo(f"  ranks: {len(manifest.parallel.ranks)}, {len(manifest.parallel.collectives)} collectives in the "
                   f"same order on all; vocabulary {manifest.parallel.vocabulary}")
    said = [(fallback.layer, f"{fallback.used} instead of {fallback.wanted}: {fallback.reason}")
            for fallback in manifest.fallbacks]
    for line in (*(f"model: {words}" for layer, words in said if layer < 0),
                 *by_reason(entry for entry in said if entry[0] >= 0)):
        click.echo(f"  fallback: {line}")
    search = manifest.quantization.search if manifest.quantization else None
    for line in search.lines() if search else ():
        click.echo(f"  {line}")
    for note in (*export.remarks, *export.notes):
        click.echo(f"  note: {note}")


def _validate(bundle: Bundle, checkpoint: str, provider: Provider, allow_pickle: bool,
              again: Callable[..., Bundle], *, short: bool, calibrate: Path | None, loras: tuple[Path, ...] = (),
              merged: Path | None = None) -> int:
    """Compare the bundle and print the verdict. again: exports anew, for a bundle whose trace may be what is wrong with
    it: one from the trace cache, and one whose layers are copies of a few. short: see `print_verdict`. loras, merged:
    adapters of the export; after the base model each is compared too."""
    from rich.console import Console

    from ..report.console import print_verdict

    while True:
        verdict, error = None, None
        try:
            verdict = _compare(bundle, checkpoint, provider, allow_pickle, calibrate, merged)
        except NotCheckedHere:
            raise
        except GqaExportError as reason:
            error = reason
        if verdict is not None and verdict.exit_code != EXIT_DIFFERENT:
            break
        failure = "the outputs differ from PyTorch's" if error is None else f"validation failed ({error.what})"
        exported = bundle.exported
        if exported is not None and exported.trace_kept:
            click.echo(f"  {failure}, and the trace came from the trace cache: it is removed, the model is traced "
                       "again")
            exported.forget_trace()
            bundle = again(trace_cache=False)
        elif exported is not None and exported.stamped and not isinstance(error, InvalidCheckpoint | UnsupportedModel):
            click.echo(f"  {failure}, and {exported.traced_layers} of {len(bundle.manifest.spec.layers)} layers were "
                       "traced, the others are copies: the model is traced again, every layer of it")
            exported.forget_trace()
            bundle = again(stamping=False)
        elif error is not None:
            raise error
        else:
            break
    assert verdict is not None
    print_verdict(verdict, Console(), short)
    bundle.record(verdict)
    for folder in loras if verdict.exit_code != EXIT_DIFFERENT else ():
        click.echo(f"adapter {folder.resolve().name}:")
        verdict = _compare(bundle, checkpoint, provider, allow_pickle, calibrate, folder)
        print_verdict(verdict, Console(), short)
        if verdict.exit_code == EXIT_DIFFERENT:
            break
    if verdict.exit_code == EXIT_DIFFERENT:
        click.echo("error: the bundle's outputs differ from PyTorch's; do not use it"
                   + (f" ({verdict.overflow})" if verdict.overflow else ""), err=True)
    return verdict.exit_code


def _compare(bundle: Bundle, checkpoint: str, provider: Provider, allow_pickle: bool,
             calibrate: Path | None, lora: Path | None = None) -> Verdict:
    """The verdict on the bundle, or on its fp32 twin where this machine cannot run its number format."""
    from ..validation.calibration import takes_text
    from .progress import progress

    calibrate = calibrate if takes_text(bundle.manifest) else None

    def validate(as_dtype: Literal["fp32"] | None) -> Verdict:
        with progress("validating") as bar:
            return bundle.validate(checkpoint, provider=provider, as_dtype=as_dtype, check_hashes=False,
                                   allow_pickle=allow_pickle, calibrate=calibrate, lora=lora, progress=bar.report)

    try:
        return validate(None)
    except NotCheckedHere as reason:
        if bundle.manifest.dtype == "float32":
            raise
        click.echo(f"  {reason.what}: its fp32 twin is compared instead")
        return validate("fp32")
