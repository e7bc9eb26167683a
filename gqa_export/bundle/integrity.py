"""Whether a bundle's files are what its manifest says: names, sizes, sha256; and whether it fits a checkpoint.

Sizes and safetensors headers are always checked. sha256 (about 0.3 GB/s) is computed for files up to a budget,
smallest first, or for all with `full`; what was left out is returned, so that it can be said.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..checkpoint.safetensors_header import header_sha256
from ..errors import GqaExportError
from ..files.sha256 import READ_BYTES, file_sha256
from ..spec import ModelSpec
from .graph_safety import check_graph_files
from .manifest import MODEL, FileFact, Manifest

HASH_BUDGET_BYTES = 1 << 30
FIX = "copy the bundle again, or export it again"


def check_files(folder: Path, manifest: Manifest, *, full: bool = False, hashes: bool = True) -> list[str]:
    """Check every file of the manifest; return the names whose sha256 was not computed.

    Raises GqaExportError naming the first file that is missing, has another size or other bytes, or lies outside.
    """
    main = manifest.engine.file if manifest.engine else MODEL
    if not (folder / main).is_file():
        raise GqaExportError(f"the bundle has no {main}", str(folder), FIX)
    home = folder.resolve()
    for name, fact in manifest.files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise GqaExportError(f"the manifest names a file outside the bundle: {name}", str(folder),
                                 "do not use this bundle")
        if not path.is_file():
            raise GqaExportError(f"the bundle's file {name} is missing", str(folder), FIX)
        if not path.resolve().is_relative_to(home):
            raise GqaExportError(f"{name} is a symbolic link that leaves the bundle", str(path),
                                 "do not use this bundle, or copy it with its links followed (cp -rL)")
        size = path.stat().st_size
        if size != fact.size:
            raise GqaExportError(f"{name} has {size} bytes, its manifest says {fact.size}", str(path), FIX)
        if fact.header_sha256 and _header(path) != fact.header_sha256:
            raise GqaExportError(f"the safetensors header of {name} is not the one that was exported", str(path),
                                 "the checkpoint was changed after the export: export it again")
    if not hashes:
        # the graph itself is small, and decides what everything else means
        small = {name: fact for name, fact in manifest.files.items() if name == main and fact.size <= READ_BYTES}
        _check_hashes(folder, small, full)
        return [name for name in manifest.files if name not in small]
    if main not in manifest.files:
        raise GqaExportError(f"the manifest says nothing of {main}", str(folder), "do not use this bundle")
    skipped = _check_hashes(folder, manifest.files, full)
    check_graph_files(folder, manifest)
    return skipped


def _check_hashes(folder: Path, files: dict[str, FileFact], full: bool) -> list[str]:
    left, skipped = HASH_BUDGET_BYTES, []
    for name, fact in sorted(files.items(), key=lambda item: item[1].size):
        if not fact.sha256 or (fact.size > left and not full):
            skipped.append(name)
            continue
        left -= fact.size
        if file_sha256(folder / name) != fact.sha256:
            raise GqaExportError(f"the content of {name} is not what its manifest says (sha256)",
                                 str(folder / name), FIX)
    return skipped


def _header(path: Path) -> str:
    try:
        return header_sha256(path)
    except GqaExportError as error:
        return f"unreadable: {error.what}"


def check_belongs(spec: ModelSpec, shown: Mapping[str, object], where: str) -> None:
    """Refuse a bundle that was not made from this checkpoint, naming the first thing that tells.

    shown: what the checkpoint's own model shows when it runs: `model_type`, `vocabulary`, `layers`, and per layer i
    `key {i}`, `value {i}`: (heads, size) of its cache.
    """
    said: dict[str, object] = {"model_type": spec.model_type, "vocabulary": spec.vocabulary}
    if all(layer.cached_alike for layer in spec.layers):
        said["layers"] = len(spec.layers)
    for number, layer in enumerate(spec.layers):
        if not layer.cached_alike:
            continue
        said[f"key {number}"] = (layer.kv_num_heads, layer.head_size)
        said[f"value {number}"] = (layer.kv_num_heads, layer.value_head_size)
    for name, value in said.items():
        if name in shown and shown[name] != value:
            spoken = f"(heads, size) of the cached {name}" if isinstance(value, tuple) else name.replace("_", " ")
            raise GqaExportError(f"the bundle does not belong to this checkpoint: {spoken} is {value} in the bundle, "
                                 f"{shown[name]} in the checkpoint", where, "pass the checkpoint it was exported from")
