"""A checkpoint -> an ONNX bundle: open, trace, lower, place the weights, write. Each step is somebody else's."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.long_facts import PREFILL, LongFacts
from ..bundle.manifest import MODEL, Manifest
from ..bundle.writer import check_output, writing_bundle
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.tokenizer import has_tokenizer
from ..errors import GqaExportError
from ..progress import Progress, silent
from ..quantizing.importance import FILE as IMPORTANCE
from ..quantizing.importance import importance_file
from ..weights.layout import place
from ..weights.memory_budget import Budget
from .adapters import adapter_facts, write_adapters
from .options import ExportOptions
from .prepare import pick_provider, prepare
from .ranks import write_ranks
from .record import add_genai, manifest_of, with_bytes
from .tokenizer_files import NO_TOKENIZER, add_tokenizer

if TYPE_CHECKING:
    from ..trace.traced import Traced


@dataclass(frozen=True)
class Export:
    """What an export did."""

    folder: Path
    manifest: Manifest
    nodes: int
    traced_layers: int
    whole_because: str
    trace_file: Path | None
    """of the trace cache, where the trace lies there"""
    trace_kept: bool
    """whether it was there before this export"""
    notes: tuple[str, ...]
    remarks: tuple[str, ...] = ()
    """what is right but slower than it could be: in the graph, with the layers it concerns, and in the tracing"""

    @property
    def stamped(self) -> bool:
        """Whether layers were not traced, but are copies of others."""
        return self.traced_layers < len(self.manifest.spec.layers)

    def forget_trace(self) -> None:
        """Remove the kept trace that this export was made from, so that no later export takes it."""
        if self.trace_file is not None:
            with contextlib.suppress(OSError):
                self.trace_file.unlink()


def export_onnx(source: str | Path | Checkpoint, output: str | Path, options: ExportOptions | None = None,
                report: Progress | None = None) -> Export:
    """Export a checkpoint into a new bundle folder. Raises GqaExportError; then nothing of it is left behind."""
    options, say = options or ExportOptions(), report or silent
    inplace = options.weights == "inplace"
    if not inplace:
        _refuse_same(source, Path(output))
        check_output(Path(os.path.abspath(output)), options.force)
    budget = Budget(options.max_ram)
    ready = prepare(source, options, say, budget, Path(output))
    checkpoint, traced, lowered, options = ready.checkpoint, ready.traced, ready.lowered, ready.options
    with writing_bundle(Path(output), force=options.force, inplace=inplace) as writer:
        say("placing weights", None, None)

        def written(done: int, total: int) -> None:
            budget.check("writing weights")
            say("writing weights", done, total)

        parallel = None
        if ready.ranks is not None:
            parallel, placement = write_ranks(ready.ranks, ready.store, writer, options, checkpoint.folder,
                                              written)
        else:
            placement = place(lowered.model, ready.store, writer, options.weights, checkpoint.folder,
                              beside=[ready.prefill.model] if ready.prefill else [], hash_full=options.hash_full,
                              on_bytes=written)
            writer.write(MODEL, lowered.model.SerializeToString())
            if ready.prefill:
                writer.write(PREFILL, ready.prefill.model.SerializeToString())
        if ready.importance:
            writer.write(IMPORTANCE, importance_file(ready.importance))
        if inplace:
            without = "" if has_tokenizer(checkpoint) else NO_TOKENIZER
        else:
            without = add_tokenizer(checkpoint, writer)
        notes = [*ready.notes, *writer.notes, *([without] if without else [])]
        manifest = replace(manifest_of(checkpoint, traced, lowered, options, ready.dtype, not without,
                                       ready.quantization, ready.kv, ready.windows, ready.needs),
                           parallel=parallel)
        write_adapters(writer, ready.adapters, ready.slots, ready.dtype)
        if ready.plan:
            manifest = replace(manifest, long=LongFacts(ready.plan, ready.plan.digest(traced.spec.layers)))
        if ready.target.genai:
            add_genai(writer, manifest, pick_provider(options.provider, ready.dtype, ready.target), notes)
        manifest = replace(manifest, source={**manifest.source, **adapter_facts(options, ready.adapters)})
        manifest = writer.finish(with_bytes(manifest, placement))
    notes += rotary_notes(traced)
    budget.check("exporting")
    return Export(Path(output), manifest, len(lowered.model.graph.node), traced.traced_layers, traced.whole_because,
                  ready.trace_file, ready.trace_taken, tuple(notes), ready.remarks)


def rotary_notes(traced: Traced) -> list[str]:
    """What a user must know of a rotary embedding that depends on the length; [] for any other."""
    if traced.rope_regime == "short":
        return [f"longrope: the capacity {traced.capacity} is within the original length, so the short table alone is "
                "in the graph"]
    if traced.rope_regime == "both":
        return [f"longrope: both tables are in the graph. In each call a sequence of up to {traced.spec.rope_switch} "
                "tokens is rotated by the short one, a longer one by the long one; keys in the cache stay as they are. "
                f"Feed a prompt of more than {traced.spec.rope_switch} tokens in one call, and where a sequence grows "
                "beyond them feed it again as a whole, as `gqa-export run` and transformers' generate do"]
    if traced.rope_regime == "dynamic":
        return [f"rotary type dynamic: up to {traced.spec.max_positions} tokens its frequencies are fixed, and the "
                f"bundle holds {traced.capacity}"]
    return []


def _refuse_same(source: str | Path | Checkpoint, output: Path) -> None:
    """The checkpoint's own folder is an output of `--weights inplace` alone, `--force` or not."""
    place = Path(source) if isinstance(source, str | Path) else source.folder
    if place.is_dir() and output.is_dir() and place.resolve() == output.resolve():
        raise GqaExportError("the output is the checkpoint's own folder", str(output),
                             "choose another folder with -o, or write the graph beside the checkpoint's files with "
                             "--weights inplace", code="E-OPTION-OUTPUT-IS-CHECKPOINT")
