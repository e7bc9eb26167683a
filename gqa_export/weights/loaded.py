"""Weights as transformers loads them, one at a time: renamed, merged and split by its own conversions, nothing kept.

transformers turns the names of a checkpoint into those of a model by rules (`get_model_conversion_mapping`): a renamed
tensor stays where it is in its file; a converted one (experts merged, a matrix split) is made whenever it is written,
by the conversion itself, from the stored tensors of that one weight. What the rules make of a checkpoint is found
without weights, on the meta device. Where experts are stacked and nothing else mixes them, they are made one by one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ..checkpoint.safetensors_header import StoredTensor
from .dtypes import itemsize
from .source_kinds import MemorySource, Source, StoredSource

if TYPE_CHECKING:
    import torch

PER_PART = ("Chunk", "Concatenate", "Interleave", "Transpose")
"""conversions that leave parts along the first dimension apart, if their own dimensions are others"""


@dataclass
class _Group:
    """The stored tensors of one conversion, by the pattern that each matched, in transformers' order."""

    converter: Any
    name: str
    dtype: torch.dtype
    parts: dict[str, list[StoredTensor]] = field(default_factory=dict)

    def make(self, model: Any, device: str, only: int | None = None) -> dict[str, torch.Tensor]:
        """What the conversion gives, by the model's names; of the stored lists only element `only`, or all."""
        converter = copy.deepcopy(self.converter)
        for pattern, tensors in self.parts.items():
            for tensor in tensors if only is None else tensors[only : only + 1]:
                converter.add_tensor(self.name, self.name, pattern, _tensor(tensor, self.dtype, device))
        made = converter.convert(self.name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def count(self) -> int:
        """How many parts along the first dimension can be made apart; 0: the conversion has to see all at once."""
        first, *others = self.converter.operations
        if type(first).__name__ != "MergeModulelist" or first.dim != 0:
            return 0
        axes = 1 + max(len(tensor.shape) for tensors in self.parts.values() for tensor in tensors)
        for other in others:
            own = [getattr(other, word) % axes for word in ("dim", "dim0", "dim1") if hasattr(other, word)]
            bound = getattr(other, "check_dims", False) or getattr(other, "num_shards_attribute", None)
            if type(other).__name__ not in PER_PART or not all(own) or bound:
                return 0
        lengths = {len(tensors) for tensors in self.parts.values()}
        return lengths.pop() if len(lengths) == 1 else 0


@dataclass(frozen=True)
class Loaded:
    """sources: name in the model -> where its weight is. largest: bytes that making one takes at most, at a time."""

    sources: dict[str, Source]
    largest: int


def loaded(stored: Mapping[str, StoredTensor], model: Any) -> Loaded | None:
    """Where every weight of a model is, as `from_pretrained` would fill it.

    Args:
        stored: the tensors of the checkpoint by name.
        model: without weights, in the type that the checkpoint is loaded in.

    Returns:
        None where the conversions cannot be followed without loading: then the model has to be loaded.
    """
    sources: dict[str, Source] = {}
    groups: dict[str, _Group] = {}
    state = model.state_dict()
    for name, renamed, converter, pattern in _renamed(stored, model, state):
        if converter is None:
            sources.setdefault(renamed, StoredSource(stored[name]))
        else:
            group = groups.setdefault(renamed, _Group(converter, renamed, state[renamed].dtype))
            group.parts.setdefault(pattern, []).append(stored[name])
    if groups.keys() & sources.keys():
        return None
    largest = 0
    for group in groups.values():
        try:
            made = group.make(model, "meta")
            count = group.count()
            part = group.make(model, "meta", 0) if count else {}
        except Exception:  # parts are missing, or a conversion looks at values: loading tells
            return None
        for name, value in made.items():
            shape = tuple(value.shape)
            alone = count and name in part and (count * len(part[name]), *part[name].shape[1:]) == shape
            make = partial(_apart, group, model, name, count) if alone else partial(_whole, group, model, name)
            dtype = str(value.dtype).removeprefix("torch.")
            sources[name] = MemorySource(make, dtype, shape)
            largest = max(largest, 3 * math.prod(shape) * itemsize(dtype) // (count if alone else 1))
    return Loaded(sources, largest)


def _whole(group: _Group, model: Any, name: str) -> torch.Tensor:
    return group.make(model, "cpu")[name]


def _apart(group: _Group, model: Any, name: str, count: int) -> Iterator[torch.Tensor]:
    for number in range(count):
        yield group.make(model, "cpu", number)[name]


def _renamed(names: Iterable[str], model: Any, state: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, str]]:
    """Stored name, name in the model, the conversion with the pattern that matched (or None, ""), in the order in which
    transformers takes them; unused ones left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix: Any = model.base_model_prefix
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)  # type: ignore[arg-type]
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], prefix, state)  # type: ignore[arg-type]
        if renamed in state:
            yield name, renamed, of_pattern[pattern] if pattern is not None else None, pattern or ""


def _tensor(stored: StoredTensor, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A stored tensor in a type; read from its file, or, on the meta device, its shape alone."""
    import torch

    if device == "meta":
        return torch.empty(stored.shape, dtype=dtype, device="meta")
    data = bytearray().join(StoredSource(stored).chunks())
    values = torch.frombuffer(data, dtype=getattr(torch, stored.dtype)) if data else torch.empty(0)
    return values.reshape(stored.shape).to(dtype)
