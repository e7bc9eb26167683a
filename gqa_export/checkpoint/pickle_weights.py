"""Weights in PyTorch's pickle files (`pytorch_model.bin`), for those who pass --allow-pickle.

A pickle is a program. It is read by `torch.load(weights_only=True)`, which knows how to build tensors and refuses
everything else; before that, the archive is held against its own size, because a compressed one can unpack to more
than any memory (PyTorch writes archives without compression).
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidCheckpoint, cause_of
from .same_weights import refuse_twice, refuse_two_checkpoints

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
CONVERT = "convert them on a machine you trust: load the model and save_pretrained(folder)"


def pickle_files(folder: Path) -> tuple[Path, ...]:
    """The pickle files of a checkpoint, in order.

    Raises:
        InvalidCheckpoint: the folder has none of the usual names, the index is not valid, a shard is missing, or a
            single file lies beside shards that are not the same.
    """
    if (folder / SINGLE).is_file():
        named = _named(folder) if (folder / INDEX).is_file() else []
        there = tuple(folder / name for name in named if (folder / name).is_file())
        if there and SINGLE not in named:
            read = read_pickles((folder / SINGLE,)), read_pickles(there)
            refuse_two_checkpoints(*read, (SINGLE, INDEX), str(folder), part=len(there) < len(named))
        return (folder / SINGLE,)
    named = _named(folder)
    missing = [name for name in named if not (folder / name).is_file()]
    if missing:
        raise InvalidCheckpoint(f"the shard {missing[0]} is missing", str(folder), "download the checkpoint again",
                                code="E-CKPT-SHARD-MISSING")
    return tuple(folder / name for name in named)


def _named(folder: Path) -> list[str]:
    """The files that the index names."""
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise ValueError("it names files that are not of this folder")
    except FileNotFoundError as error:
        raise InvalidCheckpoint(f"the folder has neither {SINGLE} nor {INDEX}", str(folder), CONVERT,
                                code="E-CKPT-NO-WEIGHTS") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidCheckpoint(f"the index of the pickle files is not valid: {error}", str(folder / INDEX), CONVERT,
                                code="E-CKPT-INDEX") from error
    return sorted(names)


def read_pickles(paths: tuple[Path, ...]) -> dict[str, torch.Tensor]:
    """All tensors of these files by name, mapped rather than read where the format allows.

    Raises:
        InvalidCheckpoint: a file holds something else than tensors, is damaged, or unpacks to more than its size; or
            two files store different values for a tensor.
    """
    state: dict[str, torch.Tensor] = {}
    files: dict[str, str] = {}
    for path in paths:
        for name, tensor in _read(path).items():
            if name in state:
                refuse_twice(name, state[name], tensor, (files[name], path.name), str(path.parent))
            state[name] = tensor
            files[name] = path.name
    return state


def _read(path: Path) -> dict[str, torch.Tensor]:
    import torch

    mapped = zipfile.is_zipfile(path)
    if mapped:
        _refuse_bomb(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever a damaged or malicious pickle makes the unpickler raise
        raise InvalidCheckpoint(f"the pickle holds something else than tensors, or is damaged: {cause_of(error)}",
                                str(path), CONVERT, code="E-CKPT-PICKLE-CONTENT") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) and isinstance(value, torch.Tensor)
                                              for name, value in found.items()):
        raise InvalidCheckpoint("the pickle is not a table of tensors by name", str(path), CONVERT,
                                code="E-CKPT-PICKLE-CONTENT")
    return found


def _refuse_bomb(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InvalidCheckpoint(f"the archive cannot be read: {error}", str(path), CONVERT,
                                code="E-CKPT-PICKLE-ARCHIVE") from error
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise InvalidCheckpoint("the archive unpacks to more bytes than it has; PyTorch does not write such files",
                                str(path), "do not use this file", code="E-CKPT-PICKLE-BOMB")
