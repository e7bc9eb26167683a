"""Opening a checkpoint: find its files, read their headers, refuse what is not a decoder checkpoint. Without torch."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import GqaExportError, InvalidCheckpoint
from ..files.read_json import read_json
from ..spec import FLOATS
from .checkpoint import Checkpoint
from .mistaken import refuse_file, refuse_folder, refuse_foreign, refuse_lfs, refuse_weights
from .pickle_permission import trust
from .pickle_weights import pickle_files, read_pickles
from .quantized.description import METHODS, described
from .refusals import LEFT_OVER, refuse_codes, refuse_quantized, refuse_raw_config, without_left_over
from .safetensors_header import StoredTensor, read_header
from .same_weights import refuse_twice, refuse_two_checkpoints

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.tiktoken"]
"""files of a hub repository that a checkpoint consists of"""
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FIX_FOLDER = "give a folder with config.json and .safetensors files, a hub id such as org/name, or a .gguf file"


def open_checkpoint(source: str | Path, *, text_only: bool = False, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint: read its configuration and headers, not its weights.

    Args:
        source: a checkpoint folder, a hub id such as org/name, a .gguf file, or any part of one (or the folder of
            its parts).
        text_only: of a multimodal model take the language model, which is given token ids alone.
        revision: branch, tag or commit of a hub id; None is the hub's main branch.

    Raises:
        InvalidCheckpoint: files are missing, damaged, contradictory or in a format that is refused.
        UnsupportedModel: the configuration alone shows that the model cannot be exported.
        GqaExportError: the hub cannot be reached, or refuses the id.
    """
    path = Path(os.path.expanduser(source))  # pathlib's raises for a user that does not exist
    if revision is not None and path.exists():
        raise GqaExportError("a revision is a branch, tag or commit of the hub, and this is a local path", str(source),
                             "leave out --revision, or give a hub id", code="E-OPTION-REVISION")
    if path.is_dir():
        return _open_folder(str(source), path, text_only)
    if path.is_file():
        return _open_file(str(source), path)
    if isinstance(source, str) and HUB_ID.fullmatch(source) and not source.endswith(".gguf"):
        folder = _download(source, revision)
        return replace(_open_folder(source, folder, text_only), revision=_commit(folder))
    raise InvalidCheckpoint("no such file or folder", str(source), FIX_FOLDER, code="E-CKPT-NOT-FOUND")


def _open_file(source: str, path: Path) -> Checkpoint:
    if path.suffix == ".safetensors" or path.name in ("config.json", INDEX):
        raise InvalidCheckpoint("this is one file of a checkpoint, not the checkpoint", source,
                                f"give the folder that holds it: {path.parent}", code="E-CKPT-ONE-FILE")
    refuse_file(path, source)
    return _open_gguf(source, path)


def _open_gguf(source: str, path: Path) -> Checkpoint:
    from .gguf_config import gguf_config, gguf_facts
    from .quantized.gguf import gguf_matrices, gguf_values_alone

    facts = gguf_facts(path)
    config = gguf_config(facts)
    refuse_raw_config(config, source)
    matrices = gguf_matrices(facts)
    kinds = sorted({matrix.label.removeprefix("GGUF ") for matrix in matrices.values()})
    return Checkpoint(source, path.parent, "gguf", facts.header.files[0], config, facts.header.stored_dtype,
                      quantized=matrices, quantization=f"GGUF {', '.join(kinds)}" if kinds else "",
                      values_alone=gguf_values_alone(facts, matrices))


def _open_folder(source: str, folder: Path, text_only: bool) -> Checkpoint:
    if (folder / "adapter_config.json").is_file():
        raise InvalidCheckpoint("this is a PEFT adapter, not a whole model", source,
                                "merge it into its base model first (peft: merge_and_unload, then save_pretrained)",
                                code="E-CKPT-ADAPTER")
    if not (folder / "config.json").is_file():
        from .gguf_parts import gguf_of_folder

        if (parts := gguf_of_folder(folder)) is not None:
            return _open_gguf(source, parts)
        refuse_folder(folder, source, FIX_FOLDER)
    refuse_lfs(folder / "config.json")
    config, notes = read_json(folder / "config.json"), tuple[str, ...]()
    description = described(folder, config)
    config, method = without_left_over(config)
    method = method or (description.method if description.file != "config.json" else "")
    if method:
        notes = (LEFT_OVER.format(file=description.file, method=method),)
    refuse_raw_config(config, source, text_only)
    if trust().pickle and not any((folder / name).exists() for name in (SINGLE, INDEX)):
        files = pickle_files(folder)
        if method:
            refuse_codes({name: str(tensor.dtype) for name, tensor in read_pickles(files).items()}, method, source)
        return Checkpoint(source, folder, "hf", None, config, _stored_dtype(config, {}), pickles=files,
                          text_only=text_only, notes=notes)
    tensors = _read_tensors(source, folder)
    refuse_foreign(config, list(tensors), source)
    if method in METHODS:
        from .quantized.conv1d import as_parameters
        from .quantized.read import read_quantized

        found = read_quantized(description, tensors, source)
        if matrices := as_parameters(found.matrices, config, method, source):
            labels = sorted({matrix.label for matrix in matrices.values()})
            return Checkpoint(source, folder, "hf", None, config, "float32", found.plain, matrices, found.packed,
                              ", ".join(labels), text_only=text_only, notes=found.notes)
    eighths = sorted(name for name, tensor in tensors.items() if tensor.dtype.startswith("float8"))
    if eighths:
        refuse_quantized(f"{tensors[eighths[0]].dtype}: {eighths[0]}", source)
    if method:
        refuse_codes({name: tensor.dtype for name, tensor in tensors.items()}, method, source)
    return Checkpoint(source, folder, "hf", None, config, _stored_dtype(config, tensors), tensors,
                      text_only=text_only, notes=notes)


def _read_tensors(source: str, folder: Path) -> dict[str, StoredTensor]:
    if (folder / INDEX).is_file():
        return _read_indexed(folder)
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if any(folder.glob("pytorch_model*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise InvalidCheckpoint("the weights are a pickle (.bin, .pt), which can run any code when opened", source,
                                "convert them on a machine you trust (load the model and save_pretrained(folder)), or "
                                "pass --allow-pickle: then tensors are read and no code is run",
                                code="E-CKPT-PICKLE")
    if (folder / SINGLE).is_symlink() or (folder / INDEX).is_symlink():
        raise InvalidCheckpoint("the weights are a symbolic link to a file that does not exist", source,
                                "the download is incomplete: download the model again", code="E-CKPT-BROKEN-LINK")
    refuse_weights(folder, source, FIX_FOLDER)


def _read_indexed(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of the index's shards; of model.safetensors where that is there too and holds the same."""
    weight_map = _weight_map(folder)
    shards = set(weight_map.values())
    if not (folder / SINGLE).is_file() or SINGLE in shards:
        return _read_shards(folder, weight_map)
    single = read_header(folder / SINGLE)
    there = {name: shard for name, shard in weight_map.items() if (folder / shard).is_file()}
    refuse_two_checkpoints(single, _read_shards(folder, there), (SINGLE, INDEX), str(folder),
                           part=len(there) < len(weight_map))
    return single


def _weight_map(folder: Path) -> dict[str, str]:
    """File by tensor, as the index has it."""
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map")
    again = "download or copy the checkpoint again"
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidCheckpoint("the index of the shards does not have a weight_map", str(folder / INDEX), again,
                                code="E-CKPT-INDEX")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InvalidCheckpoint(f"the index places tensor {name!r} in {shard!r}, which is not a file of this "
                                    "folder", str(folder / INDEX), again, code="E-CKPT-INDEX")
    return weight_map


def _read_shards(folder: Path, weight_map: dict[str, str]) -> dict[str, StoredTensor]:
    again = "download or copy the checkpoint again"
    shards: dict[str, dict[str, StoredTensor]] = {}
    tensors: dict[str, StoredTensor] = {}
    for name, shard in weight_map.items():
        if shard not in shards:
            if not (folder / shard).is_file():
                raise InvalidCheckpoint(f"the shard {shard} is missing", str(folder), again,
                                        code="E-CKPT-SHARD-MISSING")
            shards[shard] = read_header(folder / shard)
        if name not in shards[shard]:
            raise InvalidCheckpoint(f"tensor {name!r} is missing from its shard", str(folder / shard), again,
                                    code="E-CKPT-TENSORS-MISSING")
        tensors[name] = shards[shard][name]
    for shard, found in shards.items():  # transformers loads what a shard has, listed in the index or not
        for name, tensor in found.items():
            known = tensors.setdefault(name, tensor)
            if known is not tensor:
                refuse_twice(name, known, tensor, (known.path.name, shard), str(folder))
    return tensors


def _stored_dtype(config: dict[str, Any], tensors: dict[str, StoredTensor]) -> str:
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        if "float" in tensor.dtype:
            sizes[tensor.dtype] += tensor.nbytes
    if sizes:
        return sizes.most_common(1)[0][0]
    named = config.get("dtype") or config.get("torch_dtype")
    return str(named) if named in FLOATS.values() else "float32"


def _commit(snapshot: Path) -> str:
    """The commit of a snapshot in the hub's cache, which names its folder; "" if it is named otherwise."""
    return snapshot.name if COMMIT.fullmatch(snapshot.name) else ""


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=WANTED, ignore_patterns=["*/*"]))
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        replies = [getattr(cause, "response", None) for cause in (error, error.__cause__)]
        reply: Any = next((reply for reply in replies if reply is not None), None)
        if reply is None:
            raise GqaExportError("the hub is unreachable: such a folder does not exist here, the local cache does not "
                                 "hold a copy, and the download failed", hub_id, "check the network (or unset "
                                 "HF_HUB_OFFLINE), or give the path of a checkpoint folder",
                                 code="E-CKPT-HUB-UNREACHABLE") from error
        raise GqaExportError(f"the hub refused: {type(error).__name__} (HTTP {reply.status_code})", hub_id,
                             "check the id; for a gated or private model log in with `hf auth login`",
                             code="E-CKPT-HUB-REFUSED") from error
