"""The files of a bundle beside its graphs and weights; and how large all are together, before they are written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.long_facts import PREFILL, LongFacts
from ..bundle.manifest import DATA, MODEL, FileFact, Manifest
from ..bundle.writer import BundleWriter
from ..checkpoint.tokenizer import has_tokenizer
from ..quantizing.importance import FILE as IMPORTANCE
from ..quantizing.importance import importance_file
from ..weights.layout import Placement, arrange, point_at
from .adapters import adapter_facts, write_adapters
from .prepared import pick_provider
from .record import add_genai, manifest_of, with_bytes
from .tokenizer_files import NO_TOKENIZER, add_tokenizer

if TYPE_CHECKING:
    from ..bundle.parallel import ParallelFacts
    from .prepared import Prepared


def write_beside(
    ready: Prepared, writer: BundleWriter, placement: Placement, parallel: ParallelFacts | None = None
) -> tuple[Manifest, list[str]]:
    """Write what lies beside graphs and weights, but the manifest.

    Args:
        ready: the export.
        writer: of the bundle.
        placement: of its weights. parallel: of ranks, where it has several.

    Returns:
        The manifest, without the facts of files; notes for the user.
    """
    checkpoint, options = ready.checkpoint, ready.options
    if ready.importance:
        writer.write(IMPORTANCE, importance_file(ready.importance, ready.largest))
    if options.weights == "inplace":
        without = "" if has_tokenizer(checkpoint) else NO_TOKENIZER
    else:
        without = add_tokenizer(checkpoint, writer)
    notes = [*ready.notes, *writer.notes, *([without] if without else [])]
    manifest = replace(
        manifest_of(
            checkpoint,
            ready.traced,
            ready.lowered,
            options,
            ready.dtype,
            not without,
            ready.quantization,
            ready.kv,
            ready.windows, ready.needs
        ),
        parallel=parallel,
    )
    write_adapters(writer, ready.adapters, ready.slots, ready.dtype)
    if ready.plan:
        manifest = replace(manifest, long=LongFacts(ready.plan, ready.plan.digest(ready.traced.spec.layers)))
    if ready.target.genai:
        add_genai(writer, manifest, pick_provider(options.provider, ready.dtype, ready.target), notes)
    manifest = replace(manifest, source={**manifest.source, **adapter_facts(options, ready.adapters)})
    return with_bytes(manifest, placement), notes


class _Counted(BundleWriter):
    """Notes the sizes of files, and writes none."""

    def __init__(self) -> None:
        super().__init__(Path())

    def write(self, name: str, content: bytes) -> None:
        """Note one whole file."""
        self.files[name] = FileFact(len(content), "0" * 64)

    def copy(self, source: Path, name: str) -> None:
        """Note a file that would be copied."""
        self.files[name] = FileFact(source.stat().st_size, "0" * 64)


def bundle_bytes(ready: Prepared) -> int:
    """Bytes of all files of the bundle that an export with copied weights will write, the manifest too."""
    import onnx

    writer, models = _Counted(), []
    for model in (ready.lowered.model, *((ready.prefill.model,) if ready.prefill else ())):
        models.append(onnx.ModelProto())
        models[-1].CopyFrom(model)
    plan = arrange(models[0], ready.store, "copy", models[1:])
    for stream in plan.streams:
        point_at(stream, DATA)
    last = plan.streams[-1] if plan.streams else None
    if last is not None:
        writer.files[DATA] = FileFact(last.offset + last.nbytes, "0" * 64)
    for name, model in zip((MODEL, PREFILL), models):
        writer.files[name] = FileFact(model.ByteSize(), "0" * 64)
    manifest, _ = write_beside(ready, writer, Placement(plan.bytes_copied, plan.bytes_linked, ()))
    text = replace(manifest, files=dict(writer.files)).to_json()
    return sum(fact.size for fact in writer.files.values()) + len(text.encode())
