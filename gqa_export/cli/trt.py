"""`gqa-export trt`: build an engine bundle from a TensorRT bundle or a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .trust_options import revision_option, trust_options
from .words import DTYPE

if TYPE_CHECKING:
    from ..engine.build import EngineBuild
    from ..objects.choices import Attention, Dtype, Flavor


@click.command(short_help="Build a TensorRT engine, with the attention plugin or without.")
@click.argument("source", metavar="BUNDLE|CHECKPOINT")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Engine bundle folder to write.")
@click.option("--attention", type=click.Choice(["plugin", "native"]), default=None,
              help="The grouped-attention plugin, or TensorRT's own attention.  [default: the bundle's; plugin for a "
                   "checkpoint]")
@click.option("--dtype", type=DTYPE, default="auto", show_default=True,
              help="Number format of weights and cache; auto is the bundle's or checkpoint's.")
@click.option("--flavor", type=click.Choice(["auto", "tensorrt", "rtx"]), default="auto", show_default=True,
              help="TensorRT builds on the target GPU; TensorRT for RTX builds on any machine.")
@click.option("--compute-capability", "capabilities", multiple=True, metavar="X.Y",
              help="Compute capability of the target GPUs, repeatable; `current` is this machine's.  [default: 8.0, "
                   "8.9, 12.0 for rtx; this machine's for tensorrt]")
@click.option("--max-batch", type=click.IntRange(1), default=1, show_default=True, help="Most sequences per step.")
@click.option("--max-prompt", type=click.IntRange(1), default=None,
              help="Most new tokens per step.  [default: the capacity, at most 4096]")
@click.option("--capacity", type=click.IntRange(1), default=None,
              help="Longest sequence in tokens; a bundle's is fixed.  [default: the model's, at most 4096]")
@click.option("--timing-cache", type=click.Path(path_type=Path, dir_okay=False),
              help="File with TensorRT's timings; new ones are added.")
@click.option("--strip-weights", is_flag=True, help="Build without weights; refit the engine before use.")
@click.option("--workspace", "workspace_mb", type=click.IntRange(1), default=None, metavar="MB",
              help="Largest scratch memory of a layer.  [default: TensorRT's]")
@click.option("--triton-repository", type=click.Path(path_type=Path, file_okay=False), default=None,
              help="Also write a Triton Inference Server model repository there.")
@click.option("--force", is_flag=True, help="Replace an earlier bundle.")
@revision_option
@trust_options
def command(source: str, output: Path, attention: Attention | None, dtype: Dtype, flavor: Flavor,
            capabilities: tuple[str, ...], max_batch: int, max_prompt: int | None, capacity: int | None,
            timing_cache: Path | None, strip_weights: bool, workspace_mb: int | None, triton_repository: Path | None,
            revision: str | None, allow_pickle: bool, force: bool) -> None:
    """Build an engine from BUNDLE (of target trt-plugin or trt-native) or CHECKPOINT (exported on the way).

    Exit codes: 0 built, 2 bad input, 3 the build needs a GPU, which this machine lacks.
    """
    from .. import api
    from ..integrations.triton_repository import check_repository, write_repository
    from .progress import progress

    if triton_repository is not None:
        check_repository(triton_repository, output.name)
    with progress(f"building an engine of {source}") as bar:
        bundle = api.build_engine(
            source, output, attention=attention, dtype=dtype, capacity=capacity, flavor=flavor,
            compute_capability=capabilities, max_batch=max_batch, max_prompt=max_prompt, timing_cache=timing_cache,
            strip_weights=strip_weights, workspace_mb=workspace_mb, revision=revision, allow_pickle=allow_pickle,
            force=force, progress=bar.report)
    assert bundle.built is not None
    describe(bundle.built)
    if triton_repository is not None:
        click.echo(f"  Triton model repository: {write_repository(triton_repository, output)}")


def describe(build: EngineBuild) -> None:
    """Print what was built, and notes."""
    manifest, facts = build.manifest, build.facts
    made_for = ", ".join(f"{number // 10}.{number % 10}" for number in facts.compute_capabilities)
    click.echo(f"{build.folder}: {facts.flavor} {facts.version} engine for {made_for}, {manifest.dtype}, "
               f"{facts.attention} attention, capacity {manifest.capacity}, {len(manifest.spec.layers)} layers, "
               f"{manifest.bytes_copied / 1e6:,.1f} MB")
    click.echo(f"  decode: up to {facts.max_batch} sequences; prefill: up to {facts.max_prompt} new tokens each")
    if facts.plugin is not None:
        click.echo(f"  plugin: {facts.plugin.namespace}::{facts.plugin.name} version {facts.plugin.version}, "
                   f"{facts.plugin_layers} layers, {facts.build['kernel_bytes'] / 1e6:,.1f} MB of kernels inside")
    click.echo(f"  built in {facts.build['seconds']:g} s; nothing has run it yet: `gqa-export validate` does, on a GPU")
    for note in build.notes:
        click.echo(f"  note: {note}")
