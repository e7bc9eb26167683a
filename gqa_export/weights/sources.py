"""Weights by name: where their bytes are.

Graph stages hold no weights. An initializer is EXTERNAL with the location `weights:NAME`, or `weights:A+B+C` for
rows concatenated along axis 0. `WeightStore` knows where each name's bytes are: in a checkpoint's file
(`StoredSource`), codes in a checkpoint's file (`DequantizedSource`), or made by a function, one tensor at a time
(`MemorySource`: merged, computed). Parts of packed weights are sources of their own (`weights:NAME@FORM.PART`,
`gqa_export.weights.packed`).
`layout` streams them into `model.onnx.data` or points the graph into the checkpoint's own files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..checkpoint.load_model import plain_values
from ..checkpoint.quantized.parameters import parameters_of
from ..checkpoint.safetensors_header import StoredTensor
from ..errors import InvalidCheckpoint
from ..graph_io import RECIPE

if TYPE_CHECKING:
    import onnx
    import torch

    from ..checkpoint.checkpoint import Checkpoint
    from ..quantized.matrix import QuantizedMatrix
    from ..quantized.packing import Packer

CHUNK_BYTES = 4 << 20


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
        make: gives a torch tensor or numpy array of this dtype and shape, or an iterator of its parts along the first
            dimension, one at a time.
        dtype: numpy (ml_dtypes) name.
        shape: of the tensor.
    """

    make: Callable[[], Any]
    dtype: str
    shape: tuple[int, ...]

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, at most CHUNK_BYTES at a time."""
        made = self.make()
        for value in made if isinstance(made, Iterator) else (made,):
            yield from _bytes_of(value)


def _bytes_of(value: Any) -> Iterator[memoryview]:
    import numpy as np

    if hasattr(value, "detach"):
        import torch

        value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    flat: Any = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    for start in range(0, flat.nbytes, CHUNK_BYTES):
        yield memoryview(flat[start : start + CHUNK_BYTES])


@dataclass(frozen=True, eq=False)
class DequantizedSource:
    """The values of a quantized weight, in float32, made stripe by stripe.

    Attributes:
        matrix: the weight.
    """

    matrix: QuantizedMatrix
    dtype = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the model's parameter."""
        return self.matrix.parameter_shape

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, some rows at a time; of transposed ones, an expert at a time."""
        import numpy as np

        rows = self.matrix.shape[-2]
        parts = self.matrix.stripes(CHUNK_BYTES, 4) if not self.matrix.transposed else (
            (start, start + rows) for start in range(0, self.matrix.rows, rows))
        for start, stop in parts:
            values: Any = self.matrix.dequantize(start, stop)
            values = np.ascontiguousarray(values.T if self.matrix.transposed else values, np.float32)
            yield memoryview(values.reshape(-1).view(np.uint8))


@dataclass(frozen=True, eq=False)
class PackedSource:
    """One part of a packed matrix. Its bytes may have several shapes with the same rows: operators differ there."""

    packer: Packer
    part: str

    @property
    def dtype(self) -> str:
        """numpy (ml_dtypes) name."""
        return self.packer.dtype(self.part)

    @property
    def shape(self) -> tuple[int, ...]:
        """In elements of `dtype`."""
        return self.packer.shape(self.part)

    @property
    def nbytes(self) -> int:
        """Two elements of four bits have one byte."""
        return self.packer.nbytes(self.part)

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, some rows at a time."""
        yield from self.packer.chunks(self.part)


Source = StoredSource | MemorySource | DequantizedSource | PackedSource


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
            if name not in self.sources:
                raise InvalidCheckpoint(f"the graph uses the weight {name!r}, which the checkpoint does not have",
                                        recipe, "check that config.json and the weights belong together",
                                        code="E-WEIGHTS-UNKNOWN")
        return tuple(self.sources[name] for name in names)

    @classmethod
    def from_codes(cls, checkpoint: Checkpoint, wanted: Collection[str],
                   tied: Iterable[tuple[str, ...]]) -> WeightStore:
        """Where each weight of a quantized checkpoint is; those that are quantized are dequantized when they are read.

        Args:
            checkpoint: with quantized weights.
            wanted: names of the model's parameters.
            tied: groups of names that are one weight; at least one of each is stored.
        """
        matrices, plain = parameters_of(checkpoint, wanted)
        sources: dict[str, Source] = {name: StoredSource(tensor) for name, tensor in plain.items()}
        sources.update({name: _in_memory(value) for name, value in plain_values(checkpoint).items()})
        sources.update({name: DequantizedSource(matrix) for name, matrix in matrices.items()})
        store = cls(sources)
        for group in tied:
            there = [name for name in group if name in store]
            for name in group if there else ():
                if name not in store:
                    store.add(name, sources[there[0]])
        return store

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
