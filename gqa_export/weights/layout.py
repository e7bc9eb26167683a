"""Putting weights where a bundle's graph finds them: streamed into `model.onnx.data`, or in the checkpoint's own files.

`arrange` decides, for every initializer with a recipe, without writing a byte; `place` carries it out.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..bundle.manifest import DATA, FileFact
from ..bundle.writer import BundleWriter
from ..checkpoint.safetensors_header import header_sha256
from ..errors import GqaExportError, InvalidCheckpoint
from ..files.sha256 import file_sha256
from .ahead import WrittenAhead
from .source_kinds import PackedSource, Source, StoredSource
from .sources import WeightStore, recipe_of
from .streams import ALIGNMENT, Stream, bytes_of, key_of, write_streams

if TYPE_CHECKING:
    import onnx

Mode = Literal["copy", "link", "inplace"]


@dataclass(frozen=True)
class Placement:
    """Where the weights of a bundle are.

    Attributes:
        bytes_copied: in `model.onnx.data`.
        bytes_linked: in the checkpoint's own files.
        files: names of all of these files.
    """

    bytes_copied: int
    bytes_linked: int
    files: tuple[str, ...]


@dataclass
class Arrangement:
    """Where every weight of a graph goes, before a byte is written."""

    streams: list[Stream]
    files: dict[str, Path]
    """the checkpoint's own files that are used, by name"""
    bytes_linked: int = 0

    @property
    def bytes_copied(self) -> int:
        """Bytes that `model.onnx.data` will hold, padding aside."""
        return sum(stream.nbytes for stream in self.streams)


def arrange(model: onnx.ModelProto, store: WeightStore, mode: Mode,
            beside: Sequence[onnx.ModelProto] = ()) -> Arrangement:
    """Decide for every initializer with a recipe where its bytes will be, without writing a byte.

    Args:
        model: the lowered graph; initializers that use a checkpoint's file are pointed there.
        store: where each weight is.
        mode: see `place`.
        beside: see `place`.

    Raises:
        InvalidCheckpoint: the checkpoint does not have a tensor, or has it in another shape.
        GqaExportError: two files of the checkpoint have one name.
    """
    from onnx import helper

    linked_files: dict[str, Path] = {}
    linked_ranges: set[tuple[str, int, int]] = set()
    streams: dict[Any, Stream] = {}
    for tensor in [tensor for each in (model, *beside) for tensor in each.graph.initializer]:
        recipe = recipe_of(tensor)
        if not recipe:
            continue
        sources = store.sources_of(recipe)
        _check_shape(tensor, sources)
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type).name
        span = _span(sources, dtype) if mode != "copy" else None
        if span is None:
            key = (sources, dtype)
            part = None if key in streams else _part_of(sources, dtype, streams.values())
            if part is not None:
                part[0].inside.append((tensor, *part[1:]))
                continue
            streams.setdefault(key, Stream(recipe, sources, dtype, [])).tensors.append(tensor)
            continue
        path, start, nbytes = span
        if linked_files.setdefault(path.name, path) != path:
            raise GqaExportError(f"two files of the checkpoint have the name {path.name}", str(path),
                                 "use --weights copy", code="E-WEIGHTS-NAME-CLASH")
        _point(tensor, path.name, start, nbytes)
        linked_ranges.add((path.name, start, nbytes))
    ordered, offset = _parts_together(list(streams.values())), 0
    for stream in ordered:
        stream.offset = offset = offset + -offset % ALIGNMENT
        offset += stream.nbytes
    return Arrangement(ordered, linked_files, sum(nbytes for _, _, nbytes in linked_ranges))


def _parts_together(streams: list[Stream]) -> list[Stream]:
    """Parts of one packed matrix one after the other, its codes first: what a packer finds while it writes them it
    writes then, and forgets. In another order every part would read, and quantize, the whole matrix."""
    first: dict[Any, int] = {}

    def place_of(number: int) -> tuple[int, bool, int]:
        source = streams[number].sources[0]
        if not isinstance(source, PackedSource):
            return number, False, number
        return first.setdefault(source.packer, number), source.part != "codes", number

    return [streams[number] for number in sorted(range(len(streams)), key=place_of)]


def place(model: onnx.ModelProto, store: WeightStore, writer: BundleWriter, mode: Mode,
          checkpoint_folder: Path | None = None, *, beside: Sequence[onnx.ModelProto] = (), hash_full: bool = False,
          on_bytes: Callable[[int, int], None] | None = None, inside: str = "",
          ahead: WrittenAhead | None = None) -> Placement:
    """Point every initializer with a recipe at real bytes, editing `model`; constant memory for any size.

    Tensors that linked files cannot hold (converted, in memory, rows not adjacent) are streamed and counted as copied.
    What a killed export of the same left is not written again.

    Args:
        model: the lowered graph; its initializers are edited.
        store: where each weight is.
        writer: of the bundle.
        mode: "copy": all into `model.onnx.data`, equal recipes once, converted to the initializer's type. "link": hard
            links of the checkpoint's files in the bundle. "inplace": the checkpoint's files where they are.
        checkpoint_folder: the folder that in-place files must lie in; None is each file's own.
        beside: further graphs on the same weights, edited too. Their weights are those of `model` where it has them,
            also as a part of a joined matrix, and lie behind them where it has not.
        hash_full: hash linked and in-place files whole, too, with sha256.
        on_bytes: called with (done, total) streamed bytes.
        inside: the graph's folder in the bundle, "rank0/"; "" for the bundle itself. The weights lie beside the graph.
        ahead: what may have been written already; else they are written now.

    Raises:
        GqaExportError: a value overflows its new type, the output is on another file system than the linked files, or
            an in-place file lies outside the folder.
        InvalidCheckpoint: the checkpoint has a tensor in another shape than the graph.
    """
    plan = arrange(model, store, mode, beside)
    if plan.files:
        (writer.staging / inside).mkdir(exist_ok=True)
    for name, path in plan.files.items():
        if mode == "link":
            _link(path, writer.staging / inside / name)
        else:
            _check_inside(path, checkpoint_folder or path.parent)
        writer.record(inside + name, _file_fact(path, hash_full))
    if plan.streams:
        total, tell = plan.bytes_copied, on_bytes or (lambda done, total: None)
        if ahead is None or not ahead.take(plan.streams, lambda done: tell(done, total)):
            with writer.open(inside + DATA, key_of(plan.streams)) as file:
                write_streams(file, plan.streams, lambda done: tell(done, total))
        for stream in plan.streams:
            point_at(stream, DATA)
    names = (*plan.files, *((DATA,) if plan.streams else ()))
    return Placement(plan.bytes_copied, plan.bytes_linked, tuple(inside + name for name in names))


def _check_shape(tensor: onnx.TensorProto, sources: tuple[Source, ...]) -> None:
    if all(isinstance(source, PackedSource) or source.dtype == "uint8" for source in sources) and \
            math.prod(tensor.dims) == sum(math.prod(source.shape) for source in sources):
        return
    first, rows = sources[0].shape, sum(source.shape[0] if source.shape else 1 for source in sources)
    shape = first if len(sources) == 1 else (rows, *first[1:])
    if tuple(tensor.dims) != shape or any(source.shape[1:] != first[1:] for source in sources):
        raise InvalidCheckpoint(f"the graph has {recipe_of(tensor)} as {tuple(tensor.dims)}, the checkpoint as "
                                f"{[source.shape for source in sources]}", tensor.name,
                                "check that config.json and the weights belong together", code="E-WEIGHTS-SHAPE")


def _span(sources: tuple[Source, ...], dtype: str) -> tuple[Path, int, int] | None:
    """File, offset and length if these sources lie there one after the other in this very type, aligned to it."""
    tensors = [source.tensor for source in sources if isinstance(source, StoredSource)]
    if len(tensors) != len(sources) or any(tensor.dtype != dtype for tensor in tensors):
        return None
    for before, after in itertools.pairwise(tensors):
        if after.path != before.path or after.offset != before.offset + before.nbytes:
            return None
    nbytes = sum(tensor.nbytes for tensor in tensors)
    count = sum(math.prod(tensor.shape) for tensor in tensors)
    if not nbytes or tensors[0].offset % (nbytes // count):
        return None
    return tensors[0].path, tensors[0].offset, nbytes


def _part_of(sources: tuple[Source, ...], dtype: str, streams: Iterable[Stream]) -> tuple[Stream, int, int] | None:
    """(stream, offset, bytes) of a stream of this type in which these sources lie one after the other."""
    for stream in streams:
        count = len(sources)
        for first in range(len(stream.sources) - count + 1 if stream.dtype == dtype else 0):
            if stream.sources[first: first + count] == sources:
                sizes = [bytes_of(source, dtype) for source in stream.sources]
                return stream, sum(sizes[:first]), sum(sizes[first: first + count])
    return None


def _point(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def point_at(stream: Stream, location: str) -> None:
    """Let the initializers of a stream read it from a file."""
    for tensor in stream.tensors:
        _point(tensor, location, stream.offset, stream.nbytes)
    for tensor, start, nbytes in stream.inside:
        _point(tensor, location, stream.offset + start, nbytes)


def _link(path: Path, place: Path) -> None:
    try:
        os.link(path.resolve(strict=True), place)
    except OSError as error:
        raise GqaExportError(f"cannot hard-link the checkpoint's file into the bundle: {error.strerror}",
                             f"{path} -> {place.parent.parent}", "use --weights copy, or an output folder on the "
                             "checkpoint's own file system", code="E-FILE-HARD-LINK") from error


def _check_inside(path: Path, folder: Path) -> None:
    if path.resolve().parent != folder.resolve():
        raise GqaExportError("the weights are a symbolic link that leaves the checkpoint folder, and runtimes do not "
                             "follow such links", str(path), "use --weights link or --weights copy",
                             code="E-WEIGHTS-LINK-OUTSIDE")


def _file_fact(path: Path, hash_full: bool) -> FileFact:
    stat = path.stat()
    whole = file_sha256(path) if hash_full else ""
    return FileFact(stat.st_size, whole, stat.st_mtime_ns, header_sha256(path))
