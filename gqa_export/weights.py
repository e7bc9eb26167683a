"""Weights by name: where their bytes are, and putting them where a bundle's graph can find them.

Graph stages hold no weights. An initializer says EXTERNAL with the location `weights:NAME`, or `weights:A+B+C` for
rows concatenated along axis 0. `WeightStore` knows where each name's bytes are: in a checkpoint's file
(`StoredSource`) or made by a function, one tensor at a time (`MemorySource`: merged, dequantized, computed).
`place` streams them into `model.onnx.data` or points the graph into the checkpoint's own files.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .bundle import DATA, BundleWriter, FileFact
from .casting import cast, itemsize
from .checkpoint.headers import StoredTensor, header_sha256
from .errors import GqaExportError

if TYPE_CHECKING:
    import onnx
    import torch

    from .checkpoint import Checkpoint

RECIPE = "weights:"
ALIGNMENT = 64
CHUNK_BYTES = 4 << 20
SAMPLE_BYTES = 4096
Mode = Literal["copy", "link", "inplace"]


@dataclass(frozen=True)
class StoredSource:
    """A tensor whose bytes lie in a checkpoint's file."""

    tensor: StoredTensor

    @property
    def dtype(self) -> str:
        """numpy (ml_dtypes) name of the stored type."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as stored."""
        return self.tensor.shape

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, at most CHUNK_BYTES at a time; each chunk is overwritten by the next."""
        buffer = memoryview(bytearray(min(CHUNK_BYTES, max(self.tensor.nbytes, 1))))
        with open(self.tensor.path, "rb", buffering=0) as file:
            file.seek(self.tensor.offset)
            left = self.tensor.nbytes
            while left:
                count = file.readinto(buffer[: min(left, len(buffer))])
                if not count:
                    raise GqaExportError("the file became shorter while it was read", str(self.tensor.path),
                                         "export again once nothing else writes to the checkpoint")
                left -= count
                yield buffer[:count]


@dataclass(frozen=True, eq=False)
class MemorySource:
    """A tensor made on demand: `make()` gives a torch tensor or numpy array of this dtype and shape."""

    make: Callable[[], Any]
    dtype: str
    shape: tuple[int, ...]

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, at most CHUNK_BYTES at a time."""
        import numpy as np

        value = self.make()
        if hasattr(value, "detach"):
            import torch

            value = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        flat: Any = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        for start in range(0, flat.nbytes, CHUNK_BYTES):
            yield memoryview(flat[start : start + CHUNK_BYTES])


Source = StoredSource | MemorySource


class WeightStore:
    """name -> source. Two names may have one source (tied weights): it is then placed once."""

    def __init__(self, sources: dict[str, Source], aliases: dict[str, str] | None = None) -> None:
        self.sources = dict(sources)
        for name, target in (aliases or {}).items():
            self.sources[name] = self.sources[target]

    def __contains__(self, name: str) -> bool:
        return name in self.sources

    def add(self, name: str, source: Source) -> None:
        """Make a tensor known (a computed one, a renamed one)."""
        self.sources[name] = source

    def sources_of(self, recipe: str) -> tuple[Source, ...]:
        """The sources of a recipe, in order; GqaExportError for a name that is not known."""
        names = recipe.removeprefix(RECIPE).split("+")
        for name in names:
            if name not in self.sources:
                raise GqaExportError(f"the graph asks for the weight {name!r}, which the checkpoint does not have",
                                     recipe, "check that config.json and the weights belong together")
        return tuple(self.sources[name] for name in names)

    @classmethod
    def from_module(cls, checkpoint: Checkpoint, module: torch.nn.Module) -> WeightStore:
        """What each parameter and persistent buffer of a loaded module is: stored as it is, or only in memory.

        Stored means: same name and shape in the file, and the same bytes (after the module's dtype conversion) at
        its start, middle and end. Names of the file that the module does not have are stored too.
        """
        sources: dict[str, Source] = {name: StoredSource(tensor) for name, tensor in checkpoint.tensors.items()}
        seen: dict[tuple[Any, ...], Source] = {}
        state = module.state_dict(keep_vars=True)
        for name in sorted(state, key=lambda name: name not in checkpoint.tensors):
            tensor = state[name].detach()
            place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), name if not tensor.numel()
                     else "")
            if place not in seen:
                stored = checkpoint.tensors.get(name)
                if stored is not None and _is_stored(stored, tensor):
                    seen[place] = StoredSource(stored)
                else:
                    seen[place] = _in_memory(tensor)
            sources[name] = seen[place]
        return cls(sources)


def _in_memory(tensor: torch.Tensor) -> MemorySource:
    return MemorySource(lambda: tensor, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def _is_stored(stored: StoredTensor, tensor: torch.Tensor) -> bool:
    import torch

    if stored.shape != tuple(tensor.shape) or not tensor.is_contiguous():
        return False
    dtype = getattr(torch, stored.dtype)
    flat, count = tensor.reshape(-1), tensor.numel()
    window = min(count, SAMPLE_BYTES // dtype.itemsize)
    with open(stored.path, "rb") as file:
        for start in {0, (count - window) // 2, count - window} if window else ():
            file.seek(stored.offset + start * dtype.itemsize)
            sample = bytearray(file.read(window * dtype.itemsize))
            if len(sample) != window * dtype.itemsize:
                return False
            expected = torch.frombuffer(sample, dtype=dtype).to(tensor.dtype)
            if not torch.equal(expected.view(torch.uint8), flat[start : start + window].view(torch.uint8)):
                return False
    return True


@dataclass(frozen=True)
class Placement:
    """bytes_copied are in `model.onnx.data`, bytes_linked in the checkpoint's own files; `files` names all of them."""

    bytes_copied: int
    bytes_linked: int
    files: tuple[str, ...]


def recipe_of(tensor: onnx.TensorProto) -> str:
    """The recipe of an initializer, "" if it has none (its bytes are inline)."""
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    return location if location.startswith(RECIPE) else ""


def place(model: onnx.ModelProto, store: WeightStore, writer: BundleWriter, mode: Mode,
          checkpoint_folder: Path | None = None, *, hash_full: bool = False,
          on_bytes: Callable[[int, int], None] | None = None) -> Placement:
    """Point every initializer with a recipe at real bytes, editing `model`; constant memory for any size.

    copy: all into `model.onnx.data`, equal recipes once, converted where the initializer's type asks for it.
    link: hard links of the checkpoint's files in the bundle. inplace: the checkpoint's files where they are.
    What neither can hold (converted, in memory, rows not adjacent) is streamed and counted as copied.
    hash_full: sha256 of linked and in-place files too. on_bytes(done, total) counts streamed bytes.
    Raises GqaExportError: a value that overflows its new type, another file system, a file outside the folder.
    """
    from onnx import helper

    linked_files: dict[str, Path] = {}
    linked_ranges: set[tuple[str, int, int]] = set()
    streams: dict[Any, tuple[str, tuple[Source, ...], str, list[onnx.TensorProto]]] = {}
    for tensor in model.graph.initializer:
        recipe = recipe_of(tensor)
        if not recipe:
            continue
        sources = store.sources_of(recipe)
        _check_shape(tensor, sources)
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type).name
        span = _span(sources, dtype) if mode != "copy" else None
        if span is None:
            key = (sources, dtype)
            streams.setdefault(key, (recipe, sources, dtype, []))[3].append(tensor)
            continue
        path, offset, nbytes = span
        if linked_files.setdefault(path.name, path) != path:
            raise GqaExportError(f"two files of the checkpoint have the name {path.name}", str(path),
                                 "use --weights copy")
        _point(tensor, path.name, offset, nbytes)
        linked_ranges.add((path.name, offset, nbytes))
    for name, path in linked_files.items():
        if mode == "link":
            _link(path, writer.staging / name)
        else:
            _check_inside(path, checkpoint_folder or path.parent)
        writer.record(name, _file_fact(path, hash_full))
    copied = _stream(list(streams.values()), writer, on_bytes) if streams else 0
    files = tuple(linked_files) + ((DATA,) if streams else ())
    return Placement(copied, sum(nbytes for _, _, nbytes in linked_ranges), files)


def _check_shape(tensor: onnx.TensorProto, sources: tuple[Source, ...]) -> None:
    first, rows = sources[0].shape, sum(source.shape[0] if source.shape else 1 for source in sources)
    shape = first if len(sources) == 1 else (rows, *first[1:])
    if tuple(tensor.dims) != shape or any(source.shape[1:] != first[1:] for source in sources):
        raise GqaExportError(f"the graph has {recipe_of(tensor)} as {tuple(tensor.dims)}, the checkpoint as "
                             f"{[source.shape for source in sources]}", tensor.name,
                             "check that config.json and the weights belong together")


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


def _point(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def _stream(streams: list[tuple[str, tuple[Source, ...], str, list[onnx.TensorProto]]], writer: BundleWriter,
            on_bytes: Callable[[int, int], None] | None) -> int:
    total = sum(sum(math.prod(s.shape) for s in sources) * itemsize(dtype) for _, sources, dtype, _ in streams)
    done = 0
    with writer.open(DATA) as file:
        for recipe, sources, dtype, tensors in streams:
            file.write(bytes(-file.tell() % ALIGNMENT))
            offset = file.tell()
            for source in sources:
                for chunk in source.chunks():
                    out = cast(chunk, source.dtype, dtype, recipe.removeprefix(RECIPE))
                    file.write(out)
                    done += out.nbytes
                    if on_bytes:
                        on_bytes(done, total)
            for tensor in tensors:
                _point(tensor, DATA, offset, file.tell() - offset)
    return done


def _link(path: Path, place: Path) -> None:
    try:
        os.link(path.resolve(strict=True), place)
    except OSError as error:
        raise GqaExportError(f"cannot hard-link the checkpoint's file into the bundle: {error.strerror}",
                             f"{path} -> {place.parent.parent}", "use --weights copy, or an output folder on the "
                             "checkpoint's own file system") from error


def _check_inside(path: Path, folder: Path) -> None:
    if path.resolve().parent != folder.resolve():
        raise GqaExportError("the weights are a symbolic link that leaves the checkpoint folder, and runtimes do not "
                             "follow such links", str(path), "use --weights link or --weights copy")


def _file_fact(path: Path, hash_full: bool) -> FileFact:
    stat = path.stat()
    whole = ""
    if hash_full:
        with open(path, "rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest()
    return FileFact(stat.st_size, whole, stat.st_mtime_ns, header_sha256(path))
