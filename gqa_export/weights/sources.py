"""Weights by name: where their bytes are.

Graph stages hold no weights. An initializer is EXTERNAL with the location `weights:NAME`, or `weights:A+B+C` for
rows concatenated along axis 0; a name may be one of a part (`slices`). `WeightStore` knows where each name's bytes
are, one of `source_kinds`. Parts of packed weights are sources of their own (`weights:NAME@FORM.PART`,
`gqa_export.weights.packed`).
`layout` streams them into `model.onnx.data` or points the graph into the checkpoint's own files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from ..checkpoint.load_model import plain_values
from ..checkpoint.quantized.parameters import parameters_of
from ..checkpoint.safetensors_header import StoredTensor
from ..errors import InvalidCheckpoint
from ..graph_io import RECIPE
from .slices import part_of
from .source_kinds import DequantizedSource, MemorySource, Source, StoredSource, source_of_part

if TYPE_CHECKING:
    import onnx
    import torch

    from ..checkpoint.checkpoint import Checkpoint


class WeightStore:
    """Where every weight is. Two names may have one source (tied weights): it is then placed once.

    Args:
        sources: name -> source.
        aliases: further names of weights, name -> name in `sources`.

    Attributes:
        left: weights that the checkpoint stores as codes of which the values alone can be had -> what is stored.
    """

    def __init__(self, sources: dict[str, Source], aliases: dict[str, str] | None = None) -> None:
        self.sources = dict(sources)
        self.left: dict[str, str] = {}
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
    def from_codes(cls, checkpoint: Checkpoint, wanted: Collection[str],
                   tied: Iterable[tuple[str, ...]]) -> WeightStore:
        """Where each weight of a quantized checkpoint is; those that are quantized are dequantized when they are read.

        Args:
            checkpoint: with quantized weights.
            wanted: names of the model's parameters.
            tied: groups of names that are one weight; at least one of each is stored.
        """
        matrices, plain, left = parameters_of(checkpoint, wanted)
        sources: dict[str, Source] = {name: StoredSource(tensor) for name, tensor in plain.items()}
        sources.update({name: _in_memory(value) for name, value in plain_values(checkpoint).items()})
        sources.update({name: DequantizedSource(matrix) for name, matrix in matrices.items()})
        store = cls(sources)
        store.left = left
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
