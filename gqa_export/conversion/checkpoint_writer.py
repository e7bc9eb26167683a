"""A checkpoint's tensors under the names of its model, and the converted checkpoint's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.tokenizer import tokenizer_files
from ..errors import InvalidCheckpoint, UnsupportedModel
from ..progress import Bytes
from ..spec import FLOATS
from ..weights.source_kinds import MemorySource, Source, StoredSource
from .heads import read_tensor
from .safetensors_writer import size_of, write_safetensors
from .structure import Structure

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint

INDEX = "model.safetensors.index.json"


class Stored:
    """Tensors of a checkpoint by the names that its model's parameters have. untied: its head is stored, with other
    values than the embedding, whatever its config.json says."""

    def __init__(self, checkpoint: Checkpoint, structure: Structure, untied: bool = False) -> None:
        self.checkpoint, self.untied = checkpoint, untied
        self.names: dict[str, str] = {}
        wanted = {name for layer in structure.layers for name in layer.parameters()}
        for name in wanted:
            for stored in (name, name.removeprefix(structure.prefix), structure.prefix + name):
                if stored in checkpoint.tensors:
                    self.names[name] = stored
        missing = sorted(wanted - set(self.names))
        if missing:
            raise InvalidCheckpoint(f"the checkpoint does not have the tensor {missing[0]}: its weights are stored "
                                    "under other names, or merged", checkpoint.source, "load it with transformers and "
                                    "save_pretrained it first", code="E-CONVERT-TENSORS-MISSING")
        for name in sorted(wanted):
            tensor = checkpoint.tensors[self.names[name]]
            if tensor.shape != structure.shapes[name]:
                raise InvalidCheckpoint(f"{name} is {tensor.shape} in the file, but config.json requires "
                                        f"{structure.shapes[name]}", str(tensor.path), "config.json and the weights "
                                        "must belong together: download the checkpoint again",
                                        code="E-CKPT-TENSORS-SHAPE")
            if tensor.dtype not in FLOATS.values():
                raise UnsupportedModel(f"{name} is stored as {tensor.dtype}: the checkpoint is quantized",
                                       str(tensor.path), "convert the original, unquantized checkpoint",
                                       code="E-MODEL-QUANTIZED")

    def read(self, name: str) -> torch.Tensor:
        """A parameter in its stored type."""
        return read_tensor(StoredSource(self.checkpoint.tensors[self.names[name]]))

    def dtype(self, name: str) -> str:
        """The stored type of a parameter."""
        return self.checkpoint.tensors[self.names[name]].dtype


def write_checkpoint(folder: Path, stored: Stored, changed: Mapping[str, tuple[int, ...]],
                     make: Callable[[str], torch.Tensor], fields: Mapping[str, Any],
                     report: Callable[[str, float | None, float | None], None]) -> None:
    """Write every file of the converted checkpoint: shards as in the source, config.json, tokenizer.

    Args:
        folder: an existing folder to write into.
        stored: the source checkpoint.
        changed: new shapes of the parameters that `make` gives; all other tensors are copied as they are.
        make: parameter name -> the converted tensor, in its stored type.
        fields: what changes in config.json.
        report: progress, in bytes written.
    """
    checkpoint = stored.checkpoint
    model_names = {stored.names[name]: name for name in changed}
    shards: dict[str, dict[str, Source]] = {}
    for name, tensor in sorted(checkpoint.tensors.items(), key=lambda item: item[1].offset):
        source: Source = StoredSource(tensor)
        if name in model_names:
            parameter = model_names[name]
            source = MemorySource(partial(make, parameter), tensor.dtype, changed[parameter])
        shards.setdefault(tensor.path.name, {})[name] = source
    total = sum(size_of(source) for tensors in shards.values() for source in tensors.values())
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        report("writing weights", Bytes(done), Bytes(total))

    for shard in sorted(shards):
        write_safetensors(folder / shard, shards[shard], count)
    if (checkpoint.folder / INDEX).is_file():
        _write_index(folder, shards, total)
    for file in tokenizer_files(checkpoint):
        if file.name != "config.json":
            shutil.copyfile(file, folder / file.name)
    config = {**checkpoint.config, **fields, **({"tie_word_embeddings": False} if stored.untied else {})}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_index(folder: Path, shards: Mapping[str, Mapping[str, Source]], total: int) -> None:
    places = {name: shard for shard, tensors in sorted(shards.items()) for name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
