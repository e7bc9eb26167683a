"""Whether a bundle's files are those of its manifest: names, sizes, sha256; and whether it fits a checkpoint.

Sizes and safetensors headers are always checked. sha256 (about 0.3 GB/s) is computed for files up to a budget,
smallest first, or for all with `full`; what was left out is returned, so that it can be reported. A weight
file that the bundle shares with its checkpoint is hashed whenever its modification time is not the recorded one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.safetensors_header import header_sha256
from ..errors import GqaExportError, InvalidBundle
from ..files.sha256 import READ_BYTES, file_sha256
from ..spec import ModelSpec
from .graph_safety import check_graph_files
from .long_facts import PREFILL
from .manifest import MODEL, FileFact, Manifest

HASH_BUDGET_BYTES = 1 << 30
CODE = (".py", ".pyc", ".pyw", ".pyd")
FIX = "copy the bundle again, or export it again"


def check_files(folder: Path, manifest: Manifest, *, full: bool = False, hashes: bool = True) -> list[str]:
    """Check every file of a bundle against its manifest.

    Args:
        folder: the bundle.
        manifest: its manifest.
        full: compute the sha256 of every file, however large.
        hashes: False computes that of the graph only.

    Returns:
        The names of the files whose sha256 was not computed.

    Raises:
        InvalidBundle: the folder holds Python files, or a file is missing, has another size or other bytes, lies
            outside, or was modified since the export and has no recorded sha256 that proves it to be the same; names
            the first.
    """
    mains = (*main_files(manifest), *([PREFILL] if manifest.long and manifest.engine is None else []))
    for main in mains:
        if not (folder / main).is_file():
            raise InvalidBundle(f"the bundle's file {main} is missing", str(folder), FIX, code="E-BUNDLE-FILE")
    check_no_code(folder)
    home, proven = folder.resolve(), set[str]()
    for name, fact in manifest.files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InvalidBundle(f"the manifest names a file outside the bundle: {name}", str(folder),
                                "do not use this bundle", code="E-BUNDLE-OUTSIDE")
        if not path.is_file():
            raise InvalidBundle(f"the bundle's file {name} is missing", str(folder), FIX, code="E-BUNDLE-FILE")
        if not path.resolve().is_relative_to(home):
            raise InvalidBundle(f"{name} is a symbolic link that leaves the bundle", str(path),
                                "do not use this bundle, or copy it with its links followed (cp -rL)",
                                code="E-BUNDLE-OUTSIDE")
        size = path.stat().st_size
        if size != fact.size:
            raise InvalidBundle(f"{name} has {size} bytes, {fact.size} in its manifest", str(path), FIX,
                                code="E-BUNDLE-FILE-SIZE")
        if fact.header_sha256 and _header(path) != fact.header_sha256:
            raise InvalidBundle(f"the safetensors header of {name} is not the one that was exported", str(path),
                                "the checkpoint was changed after the export: export it again",
                                code="E-BUNDLE-HEADER")
        if _modified(path, fact):
            _check_hash(path, fact)
            proven.add(name)
    files = {name: fact for name, fact in manifest.files.items() if name not in proven}
    if not hashes:
        # the graph itself is small, and decides what everything else means
        small = {name: fact for name, fact in files.items() if name in mains and fact.size <= READ_BYTES}
        _check_hashes(folder, small, full)
        return [name for name in files if name not in small]
    for main in mains:
        if main not in manifest.files:
            raise InvalidBundle(f"the manifest does not list {main}", str(folder), "do not use this bundle",
                                code="E-BUNDLE-UNLISTED")
    skipped = _check_hashes(folder, files, full)
    check_graph_files(folder, manifest)
    return skipped


def main_files(manifest: Manifest) -> list[str]:
    """The names of a bundle's graphs, or engines: one, or one for each rank."""
    main = manifest.engine.file if manifest.engine else MODEL
    return [f"{rank.folder}/{main}" for rank in manifest.parallel.ranks] if manifest.parallel else [main]


def _check_hashes(folder: Path, files: dict[str, FileFact], full: bool) -> list[str]:
    left, skipped = HASH_BUDGET_BYTES, []
    for name, fact in sorted(files.items(), key=lambda item: item[1].size):
        if not fact.sha256 or (fact.size > left and not full):
            skipped.append(name)
            continue
        left -= fact.size
        _check_hash(folder / name, fact)
    return skipped


def check_no_code(folder: Path) -> None:
    """Refuse a folder with Python files, named in the manifest or not: no bundle needs one, and other programs that
    load the tokenizer or the configuration beside it may run it.

    Raises:
        InvalidBundle: there is one; names the first.
    """
    for place, _, names in os.walk(folder):
        for name in sorted(names):
            if name.lower().endswith(CODE):
                raise InvalidBundle(f"the bundle holds Python code: {name}", str(Path(place, name)),
                                    "read the file, and remove it if nothing needs it; a checkpoint with code of its "
                                    "own is exported with --weights link or copy", code="E-BUNDLE-CODE")


def _modified(path: Path, fact: FileFact) -> bool:
    """Whether only its sha256 can tell that a file is the one of the export.

    Raises:
        InvalidBundle: and that was not recorded.
    """
    if fact.mtime_ns == path.stat().st_mtime_ns or (fact.sha256 and not fact.mtime_ns):
        return False
    if not fact.sha256:
        found = "was modified after the export" if fact.mtime_ns else "has no modification time in the manifest"
        raise InvalidBundle(f"{path.name} {found}, and the manifest has no sha256 that could prove it unchanged",
                            str(path), "export again (with --hash the sha256 is recorded); copy bundles with their "
                            "times: cp -a, rsync -t", code="E-BUNDLE-MODIFIED")
    return True


def _check_hash(path: Path, fact: FileFact) -> None:
    if file_sha256(path) != fact.sha256:
        raise InvalidBundle(f"the content of {path.name} is not that of its manifest (sha256)", str(path), FIX,
                            code="E-BUNDLE-HASH")


def _header(path: Path) -> str:
    try:
        return header_sha256(path)
    except GqaExportError as error:
        return f"unreadable: {error.what}"


def check_belongs(spec: ModelSpec, shown: Mapping[str, object], where: str) -> None:
    """Check that a bundle was made from a checkpoint.

    Args:
        spec: the bundle's model.
        shown: facts of the checkpoint's model as it runs: `model_type`, `vocabulary`, `layers` (how many have
            attention), `layer numbers`, `caches read` (of each layer, whose), `states` (layer, name and shape of
            each), `alike` (numbers of the layers whose keys and values its own cache holds), and per entry i of its
            cache `key {i}`, `value {i}`: (heads, size).
        where: the checkpoint.

    Raises:
        InvalidBundle: a fact differs; names the first.
    """
    stated: dict[str, object] = {"model_type": spec.model_type, "vocabulary": spec.vocabulary,
                                 "layers": len(spec.layers),
                                 "layer numbers": tuple(layer.layer for layer in spec.layers),
                                 "states": tuple((state.layer, state.name, state.shape) for state in spec.states)}
    read: Any = shown.get("caches read")
    if read is not None and len(read) == len(spec.layers):  # a layer may keep a copy of what it could read elsewhere
        stated["caches read"] = tuple(own if layer.owner is None else layer.owner
                                      for layer, own in zip(spec.layers, read, strict=True))
    alike: Any = shown.get("alike")
    for number, layer in enumerate(spec.owners):
        if alike is not None and layer.layer not in alike:
            continue  # the checkpoint's own facts decide: a manifest could switch the comparison off
        stated[f"key {number}"] = (layer.kv_num_heads, layer.head_size)
        stated[f"value {number}"] = (layer.kv_num_heads, layer.value_head_size)
    for name, value in stated.items():
        if name in shown and shown[name] != value:
            label = f"(heads, size) of the cached {name}" if name[-1].isdigit() else name.replace("_", " ")
            raise InvalidBundle(f"the bundle does not belong to this checkpoint: {label} is {value} in the bundle, "
                                f"{shown[name]} in the checkpoint", where, "pass the checkpoint it was exported from",
                                code="E-BUNDLE-FOREIGN")
