"""A checkpoint -> an ONNX bundle: open, trace, lower, place the weights, write. Each step is somebody else's."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.long_facts import PREFILL
from ..bundle.manifest import DATA, MODEL, Manifest
from ..bundle.writer import check_output, staged_bundle, writing_bundle
from ..checkpoint.checkpoint import Checkpoint
from ..errors import GqaExportError
from ..files.resume import resumable
from ..files.staging import disk_errors
from ..progress import Bytes, Progress, silent
from ..weights.ahead import WrittenAhead
from ..weights.layout import place
from ..weights.memory_budget import Budget
from ..weights.streams import key_of
from .bundle_files import write_beside
from .expected_weights import expected_streams
from .limits import refuse_larger
from .options import ExportOptions
from .prepare import prepare
from .ranks import write_ranks

if TYPE_CHECKING:
    from ..trace.traced import Traced
    from .prepared import Prepared


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
    if options.weights != "inplace":
        _refuse_same(source, Path(output))
        check_output(Path(os.path.abspath(output)), options.force)
    budget = Budget(options.max_ram)
    with contextlib.ExitStack() as begun:
        ahead: list[WrittenAhead] = []

        def opened(checkpoint: Checkpoint, dtype: str) -> None:
            streams = expected_streams(checkpoint, options, dtype)
            # what a killed export left is taken up when the graph is there: until then a refusal must not cost it
            if streams and not resumable(Path(os.path.abspath(output)), DATA, key_of(streams)):
                with disk_errors(Path(output)):
                    writer = begun.enter_context(staged_bundle(Path(output), claim=False))
                ahead.append(WrittenAhead(writer, DATA, streams))
                begun.push(ahead[0])
                ahead[0].start()

        ready = prepare(source, options, say, budget, Path(output), opened)
        return _written(ready, Path(output), say, budget, ahead[0] if ahead else None)


def _written(ready: Prepared, output: Path, say: Progress, budget: Budget, ahead: WrittenAhead | None) -> Export:
    """Write the bundle. ahead: what of it is being written already."""
    checkpoint, traced, lowered, options = ready.checkpoint, ready.traced, ready.lowered, ready.options
    with writing_bundle(output, force=options.force, inplace=options.weights == "inplace",
                        begun=ahead.writer if ahead else None) as writer:
        say("placing weights", None, None)

        def written(done: int, total: int) -> None:
            budget.check("writing weights")
            say("writing weights", Bytes(done), Bytes(total))

        parallel = None
        if ready.ranks is not None:
            parallel, placement = write_ranks(ready.ranks, ready.store, writer, options, checkpoint.folder,
                                              written)
        else:
            placement = place(lowered.model, ready.store, writer, options.weights, checkpoint.folder,
                              beside=[ready.prefill.model] if ready.prefill else [], hash_full=options.hash_full,
                              on_bytes=written, ahead=ahead)
            writer.write(MODEL, lowered.model.SerializeToString())
            if ready.prefill:
                writer.write(PREFILL, ready.prefill.model.SerializeToString())
        manifest, notes = write_beside(ready, writer, placement, parallel)
        refuse_larger(options.max_size, writer, manifest)
        manifest = writer.finish(manifest)
    notes += rotary_notes(traced)
    budget.check("exporting")
    return Export(output, manifest, len(lowered.model.graph.node), traced.traced_layers, traced.whole_because,
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
