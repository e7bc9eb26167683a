"""Weights by name: where their bytes are.

Graph stages hold no weights. An initializer is EXTERNAL with the location `weights:NAME`, or `weights:A+B+C` for
rows concatenated along axis 0; a name may be one of a part (`slices`). `WeightStore` knows where each name's bytes
are: in a checkpoint's file (`StoredSource`) or made by a function, one tensor at a time (`MemorySource`: merged,
dequantized, computed). `layout` streams them into `model.onnx.data` or points the graph into the checkpoint's own
files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..checkpoint.safetensors_header import StoredTensor
from ..errors import InvalidCheckpoint
from ..graph_io import RECIPE
from .dtypes import itemsize
from .slices import CHUNK_BYTES, Part, Pieces, made_pieces, part_of, stored_pieces

if TYPE_CHECKING:
    import onnx
    import torch

    from ..checkpoint.checkpoint import Checkpoint


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
        with open(self.tensor.path, "rb") as file:
            file.seek(self.tensor.offset)
            left = self.tensor.nbytes
            while left:
                count = min(left, len(buffer))
                if file.readinto(buffer[:count]) != count:
                    raise InvalidCheckpoint("the file became shorter while it was read", str(self.tensor.path),
                                            "export again once nothing else writes to the checkpoint",
                                            code="E-WEIGHTS-FILE-CHANGED")
                left -= count
                yield buffer[:count]


@dataclass(frozen=True, eq=False)
class MemorySource:
    """A tensor made on demand.

    Attributes:
        make: gives a torch tensor or numpy array of this dtype and shape.
        dtype: numpy (ml_dtypes) name.
        shape: of the tensor.
    """

    make: Callable[[], Any]
    dtype: str
    shape: tuple[int, ...]

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, at most CHUNK_BYTES at a time."""
        import numpy as np

        value = self.make()
        if hasattr(value, "detach"):
            import torch

            value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        flat: Any = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        for start in range(0, flat.nbytes, CHUNK_BYTES):
            yield memoryview(flat[start : start + CHUNK_BYTES])


@dataclass(frozen=True)
class SliceSource:
    """Some ranges of one axis of a tensor, in order: read piece by piece where the tensor is stored.

    Attributes:
        whole: the tensor.
        axis: of it.
        ranges: [start, stop) of entries.
    """

    whole: StoredSource | MemorySource
    axis: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def dtype(self) -> str:
        """As of the whole."""
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part."""
        shape = self.whole.shape
        return (*shape[:self.axis], sum(stop - start for start, stop in self.ranges), *shape[self.axis + 1:])

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, about CHUNK_BYTES at a time; each chunk is overwritten by the next."""
        shape = self.whole.shape
        entry = math.prod(shape[self.axis + 1:]) * itemsize(self.dtype)
        pieces = Pieces(math.prod(shape[:self.axis]), shape[self.axis] * entry,
                        tuple((start * entry, (stop - start) * entry) for start, stop in self.ranges))
        if isinstance(self.whole, StoredSource):
            return stored_pieces(self.whole.tensor.path, self.whole.tensor.offset, pieces)
        return made_pieces(self.whole.make(), pieces)


Source = StoredSource | MemorySource | SliceSource


def source_of_part(part: Part, source: Source) -> Source:
    """Where the bytes of a part are. Rows of a stored tensor are a stored tensor again, so that a graph can point at
    them. source: where those of the whole are."""
    (start, stop), *more = part.ranges
    if isinstance(source, SliceSource):
        raise TypeError(f"a part of a part of {part.whole}")
    if isinstance(source, StoredSource) and not part.axis and not more:
        row = math.prod(source.shape[1:]) * itemsize(source.dtype)
        return StoredSource(replace(source.tensor, offset=source.tensor.offset + start * row,
                                    nbytes=(stop - start) * row, shape=(stop - start, *source.shape[1:])))
    return SliceSource(source, part.axis, part.ranges)


class WeightStore:
    """Where every weight is. Two names may have one source (tied weights): it is then placed once.

    Args:
        sources: name -> source.
        aliases: further names of weights, name -> name in `sources`.
    """

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
        """The sources of a recipe, in order.

        Raises:
            InvalidCheckpoint: the recipe names a tensor that the checkpoint does not have.
        """
        names = recipe.removeprefix(RECIPE).split("+")
        for name in names:
            part = None if name in self.sources else part_of(name)
            if part is not None and part.whole in self.sources:
                self.sources[name] = source_of_part(part, self.sources[part.whole])
            if name not in self.sources:
                raise InvalidCheckpoint(f"the graph uses the weight {name!r}, which the checkpoint does not have",
                                        recipe, "check that config.json and the weights belong together",
                                        code="E-WEIGHTS-UNKNOWN")
        return tuple(self.sources[name] for name in names)

    @classmethod
    def from_module(cls, checkpoint: Checkpoint, module: torch.nn.Module) -> WeightStore:
        """Where each parameter and persistent buffer of a loaded module is: stored as it is, or only in memory.

        Stored means: same name and shape in the file, and the same bytes (after the module's dtype conversion), all of
        them. Names of the file that the module does not have are stored too.

        Args:
            checkpoint: that the module was loaded from.
            module: with its weights.
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
    """Whether every element is the stored one, converted; read CHUNK_BYTES at a time, up to the first that differs."""
    import torch

    if stored.shape != tuple(tensor.shape) or not tensor.is_contiguous():
        return False
    flat, done = tensor.reshape(-1), 0
    for chunk in StoredSource(stored).chunks():
        values = torch.frombuffer(chunk, dtype=getattr(torch, stored.dtype))
        expected = values.to(tensor.dtype)  # sizes of elements divide CHUNK_BYTES: no chunk ends inside one
        found = flat[done : done + len(values)]
        if not torch.equal(expected.view(torch.uint8), found.view(torch.uint8)):
            return False
        done += len(values)
    return True


def recipe_of(tensor: onnx.TensorProto) -> str:
    """The recipe of an initializer, "" if it has none (its bytes are inline)."""
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    return location if location.startswith(RECIPE) else ""
