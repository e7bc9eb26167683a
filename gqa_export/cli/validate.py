"""`gqa-export validate`: compare a bundle with PyTorch, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from .long_options import parsed_lengths
from .report_options import report_options
from .trust_options import revision_option, trust_options

if TYPE_CHECKING:
    from ..objects.choices import Level, Provider
    from ..report.reports import Reports


@click.command(short_help="Compare a bundle with PyTorch, step by step.")
@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--against", metavar="CHECKPOINT", help="Checkpoint that they were exported from: folder, hub id or "
              "GGUF file. Without it, several bundles are compared with one another only.")
@click.option("--as", "as_dtype", type=click.Choice(["fp32"]), help="Check the fp32 twin of a bf16 or fp16 bundle.")
@click.option("--provider", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
              help="Where ONNX Runtime runs the bundle.")
@click.option("--level", type=click.Choice(["quick", "full"]), default="quick", show_default=True,
              help="Which cases: those of a minute, or all.")
@click.option("--text", type=click.Path(path_type=Path, dir_okay=False),
              help="Also measure perplexity, and the loss, on this file.")
@click.option("--reference", metavar="CHECKPOINT", help="Measure the loss against this checkpoint, from before it was "
              "quantized: KL divergence, best tokens, perplexity.")
@click.option("--calibrate", type=click.Path(path_type=Path, dir_okay=False), metavar="TEXT",
              help="The text that the bundle was exported with (onnx --calibrate).")
@click.option("--max-kl", type=float, metavar="NATS", help="Fail if the mean KL divergence from --reference is larger.")
@click.option("--max-perplexity-increase", type=float, metavar="PERCENT", help="Fail if perplexity increases by more.")
@click.option("--max-loss", type=float, metavar="NATS", help="Fail if approximate attention for long prompts loses "
              "more on --text, per token.")
@click.option("--min-copy", type=float, metavar="SHARE", help="Fail if approximate attention leaves less of what the "
              "exact model gains on a repeated passage of --text.")
@click.option("--lengths", metavar="4096,8192", help="Tokens of the prompts that approximate attention is measured "
              "on.  [default: one that fits]")
@click.option("--steps", type=click.IntRange(1), help="Decode steps of each case.  [default: 32]")
@click.option("--lora", type=click.Path(path_type=Path), metavar="DIR",
              help="Compare with this LoRA adapter: merged into the checkpoint, in use in a bundle that can switch.")
@click.option("--record", is_flag=True, help="Write the verdict, and the loss, into the bundle's manifest.")
@click.option("--hash", "full_hash", is_flag=True, help="Compute the sha256 of every file, however large.")
@report_options
@revision_option
@trust_options
def command(bundles: tuple[Path, ...], against: str | None, as_dtype: Literal["fp32"] | None, provider: Provider,
            level: Level, text: Path | None, reference: str | None, calibrate: Path | None, max_kl: float | None,
            max_perplexity_increase: float | None, steps: int | None, full_hash: bool, revision: str | None,
            allow_pickle: bool, reports: Reports, lora: Path | None, max_loss: float | None, min_copy: float | None,
            lengths: str | None, record: bool) -> None:
    """Compare BUNDLES with their checkpoint: logits, every new key and value, the whole cache. Several bundles are also
    compared with one another.

    Exit codes: 0 passed, 1 the outputs differ (or drifted from the baseline, or too much was lost), 2 bad input,
    3 could not be checked here.
    """
    from rich.console import Console

    from .. import api
    from ..report.console import print_verdict
    from ..validation.calibration import takes_text
    from .progress import progress

    if against is None and len(bundles) == 1:
        raise click.UsageError("one bundle is compared with its checkpoint: pass --against CHECKPOINT")
    if against is None and (reference, max_kl, max_perplexity_increase) != (None, None, None):
        raise click.UsageError("the loss is measured beside the comparison: pass --against CHECKPOINT too")
    if against is None and (max_loss, min_copy, lengths) != (None, None, None):
        raise click.UsageError("what approximate attention costs is measured in PyTorch: pass --against CHECKPOINT too")
    if record and (against is None or lora is not None):
        raise click.UsageError("what is recorded is the comparison with the checkpoint that was exported: pass "
                               "--against CHECKPOINT, and no --lora")
    prompts = () if lengths is None else parsed_lengths(lengths)
    verdicts = []
    if against is not None:
        calibrated = [bundle for bundle in bundles if calibrate and takes_text(api.open_bundle(bundle).manifest)]
        for bundle in bundles:
            say_what_was_checked(bundle)
            with progress(f"validating {bundle.name}") as bar:
                verdicts.append(api.open_bundle(bundle).validate(
                    against, level=level, steps=steps, text=text, provider=provider, as_dtype=as_dtype,
                    full_hash=full_hash, revision=revision, allow_pickle=allow_pickle, reference=reference,
                    calibrate=calibrate if bundle in calibrated or not calibrated else None, max_kl=max_kl,
                    max_perplexity_increase=max_perplexity_increase, lora=lora, max_loss=max_loss,
                    min_copy=min_copy, lengths=prompts, progress=bar.report))
            if record:
                api.open_bundle(bundle).record(verdicts[-1])
    if len(bundles) > 1:
        with progress("comparing the bundles with one another") as bar:
            verdicts += api.cross_check(bundles, level=level, steps=steps, provider=provider, as_dtype=as_dtype,
                                        progress=bar.report)
    for verdict in verdicts:
        print_verdict(verdict, Console())
    outcome = reports.finish([str(bundle) for bundle in bundles], against or str(bundles[0]), verdicts)
    for line in (*(f"drift: {drift}" for drift in outcome.drifts), *outcome.notes):
        click.echo(line)
    raise SystemExit(outcome.exit_code)


def say_what_was_checked(bundle: Path) -> None:
    """Of an engine bundle: what can be told without running it. Raises GqaExportError."""
    from ..bundle.manifest import read_manifest

    if read_manifest(bundle).engine is None:
        return
    from ..runtime.tensorrt.check import check_bundle

    for line in check_bundle(bundle).lines:
        click.echo(f"checked: {line}")
