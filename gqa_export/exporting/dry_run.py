"""What an export would write, how long it would take and how much memory, without writing anything."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from ..bundle.long_facts import PREFILL
from ..bundle.manifest import DATA, MODEL
from ..bundle.parallel import rank_folder
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.tokenizer import tokenizer_files
from ..environment.machine import peak_bytes
from ..progress import Progress, silent
from ..targets import TARGETS, Target, reasons_against
from ..weights.dtypes import cast
from ..weights.layout import Arrangement, arrange
from ..weights.memory_budget import Budget
from ..weights.source_kinds import MemorySource
from .options import ExportOptions
from .prepare import prepare
from .prepared import Prepared

SAMPLE_BYTES = 48 << 20


@dataclass(frozen=True)
class Plan:
    """An export that was thought through. Times in seconds, sizes in bytes."""

    title: str
    files: tuple[tuple[str, int, str], ...]
    """name, bytes, how it comes about"""
    prepared_s: float
    weights_s: float
    peak_bytes: int
    targets: tuple[tuple[str, str], ...]
    """for each target: what it would do with this model"""
    fallbacks: tuple[str, ...]
    quantization: tuple[str, ...] = ()
    """what becomes of each quantized matrix"""
    notes: tuple[str, ...] = ()
    """what else a reader must know: unused tensors; what is right but slower than it could be"""

    def lines(self) -> list[str]:
        """For people."""
        out = [self.title, "  would write:"]
        out += [f"    {name:<28} {size / 1e6:>12,.1f} MB  {how}" for name, size, how in self.files]
        out.append(f"  time: {self.prepared_s:.1f} s until here, about {self.weights_s:.1f} s for the weights "
                   "(reading, converting and hashing, measured on a sample; the disk's writing speed was not measured)")
        out.append(f"  memory: {self.peak_bytes / 1e9:.2f} GB at the most")
        out += [f"  {line}" for line in self.quantization]
        out += [f"  fallback: {line}" for line in self.fallbacks]
        out += [f"  note: {note}" for note in self.notes]
        out.append("  targets:")
        out += [f"    {name:<12} {what}" for name, what in self.targets]
        return [*out, "  nothing was written"]


def dry_run(source: str | Path | Checkpoint, options: ExportOptions, output: Path | None = None,
            report: Progress | None = None) -> Plan:
    """Do all of an export but the writing. Raises what the export would raise before it writes."""
    started = time.perf_counter()
    ready = prepare(source, options, report or silent, Budget(options.max_ram), output)
    graphs = [("", ready.lowered)] if ready.ranks is None else \
        [(f"{rank_folder(number)}/", lowered) for number, lowered in enumerate(ready.ranks.lowered)]
    beside = [ready.prefill.model] if ready.prefill else []
    plans = [(inside, arrange(lowered.model, ready.store, ready.options.weights, beside), lowered.model.ByteSize())
             for inside, lowered in graphs]
    prepared = time.perf_counter() - started
    seconds = sum(_weights_seconds(plan) for _, plan, _ in plans[:1]) * len(plans)
    files = [row for inside, plan, size in plans for row in _files(inside, plan, size, ready.options.weights)]
    files += [(PREFILL, model.ByteSize(), "the graph for long prompts") for model in beside]
    files += [(path.name, path.stat().st_size, "copied") for path in tokenizer_files(ready.checkpoint)]
    spec = ready.traced.spec
    title = (f"{ready.checkpoint.source}: {spec.architecture}, {len(spec.layers)} layers, target {ready.target.name}, "
             f"{ready.dtype}, {ready.options.cache} cache, capacity {ready.traced.capacity}")
    return Plan(title, tuple(files), prepared, seconds, peak_bytes(),
                tuple((name, _suits(target, ready)) for name, target in TARGETS.items()),
                tuple(f"layer {f.layer}: {f.used} instead of {f.wanted}: {f.reason}"
                      for f in ready.lowered.fallbacks),
                tuple(ready.quantization.lines()) if ready.quantization else (), (*ready.notes, *ready.remarks))


def _files(inside: str, plan: Arrangement, model_bytes: int, weights: str) -> list[tuple[str, int, str]]:
    """The files of one graph: name, bytes, how each comes about."""
    files = [(inside + MODEL, model_bytes, "the graph")]
    if plan.streams:
        kinds = {"converted or copied" if not isinstance(source, MemorySource) else "merged or dequantized"
                 for stream in plan.streams for source in stream.sources}
        files.append((inside + DATA, plan.bytes_copied, " and ".join(sorted(kinds)) + f", {len(plan.streams)} tensors"))
    how = "hard link to the checkpoint's file" if weights == "link" else "used where it lies"
    return files + [(inside + name, path.stat().st_size, how) for name, path in plan.files.items()]


def _suits(target: Target, ready: Prepared) -> str:
    """What a target would do with each layer, by the table."""
    layers = ready.traced.spec.layers
    if ready.traced.spec.states and target.states_missing:
        return f"refused: layers that keep a state of fixed size: {target.states_missing}"
    reasons = "; ".join(reasons_against(layers, target))
    unheld = sum(bool(target.cannot_hold(layer)) for layer in layers)
    runs = ", ".join(provider for provider, types in target.dtypes.items() if ready.dtype in types)
    where = f"runs {ready.dtype} on {runs}" if runs else f"has no kernels for {ready.dtype}"
    if not reasons:
        return f"holds all {len(layers)} layers as {target.attention}; {where}"
    if target.fallback:
        return f"{unheld} of {len(layers)} layers as {target.fallback}: {reasons}; {where}"
    return f"refused: {reasons}"


def _weights_seconds(plan: Arrangement) -> float:
    """Reading, converting and hashing all that is streamed, from a sample of it."""
    import hashlib

    digest, done, started = hashlib.sha256(), 0, time.perf_counter()
    for stream in plan.streams:
        for source in stream.sources:
            for chunk in source.chunks():
                out = cast(chunk, source.dtype, stream.dtype, stream.recipe)
                digest.update(out)
                done += out.nbytes
                if done >= SAMPLE_BYTES:
                    return (time.perf_counter() - started) * plan.bytes_copied / done
    return time.perf_counter() - started
