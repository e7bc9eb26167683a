"""Whether an engine bundle is sound and fits what is here, in the order in which it costs: manifest, files, kernels
inside the engine, then GPU and library. Everything up to the GPU needs neither TensorRT nor a driver.

Each mismatch is a GqaExportError with its fix; what this machine cannot know is a NotCheckedHere.
"""

from __future__ import annotations

import hashlib
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...bundle.engine_facts import DECODE, FLAVORS, PREFILL, REBUILD, EngineFacts
from ...bundle.integrity import check_files
from ...bundle.manifest import Manifest, read_manifest
from ...bundle.rank_view import ranks_of
from ...errors import GqaExportError, InvalidBundle, NotCheckedHere
from ...graph_io import INPUT_IDS, LOGITS, NEW_LENGTHS, PAST_LENGTHS, past_names, present_names

BUILD = "make one of it with `gqa-export trt BUNDLE -o ENGINE_BUNDLE`"


@dataclass(frozen=True)
class Checked:
    """A bundle whose files are what they should be. lines: what was checked, for people."""

    manifest: Manifest
    facts: EngineFacts
    lines: tuple[str, ...]


def check_bundle(folder: Path | str, *, full: bool = False) -> Checked:
    """Check everything that needs no GPU. full: sha256 of files however large. Raises GqaExportError."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    facts = facts_of(manifest, str(folder))
    skipped = check_files(folder, manifest, full=full)
    lines = [f"manifest: {FLAVORS[facts.flavor]} {facts.version}, {facts.attention} attention, {manifest.dtype}, "
             f"capacity {manifest.capacity}, up to {facts.max_batch} sequences, {facts.max_prompt} new tokens at once, "
             f"for {capabilities(facts)}",
             f"files: {len(manifest.files)} of the stated size" + ("" if skipped else " and sha256"),
             f"cache: {len(facts.aliases)} outputs in the memory of their inputs"]
    if facts.plugin is not None:
        kernels = [_check_kernels(place, facts) for _, place, _ in ranks_of(folder, manifest)]
        lines.append(f"plugin: {facts.plugin.namespace}::{facts.plugin.name} version {facts.plugin.version}, "
                     f"{facts.plugin_layers} layers, as this gqa-export has it; {kernels[0]}")
    if facts.build.get("layers"):
        lines.append("build log: " + "; ".join(f"{profile}: " + ", ".join(f"{count} {kind}" for kind, count in
                     kinds.items()) for profile, kinds in facts.build["layers"].items()))
    return Checked(manifest, facts, tuple(lines))


def facts_of(manifest: Manifest, where: str) -> EngineFacts:
    """The engine's facts, held against the rest of the manifest and against this package's plugin."""
    facts = manifest.engine
    if facts is None:
        raise InvalidBundle(f"expected an engine bundle, got a graph for {manifest.target}", where, BUILD,
                            code="E-ENGINE-MISSING")
    if facts.flavor not in FLAVORS:
        raise InvalidBundle(f"unknown engine flavor {facts.flavor!r}, expected one of {', '.join(FLAVORS)}", where,
                            REBUILD, code="E-ENGINE-FLAVOR")
    if facts.stripped:
        raise InvalidBundle("the engine was built without its weights, and this runtime does not put them back", where,
                            "build it without --strip-weights", code="E-ENGINE-STRIPPED")
    wanted = {LOGITS: ""} | {present: past for layer in manifest.spec.owners
                             for present, past in zip(present_names(layer.layer), past_names(layer.layer))}
    loose = [name for name, past in wanted.items() if past and facts.aliases.get(name) != past]
    if loose:
        raise InvalidBundle(f"the engine does not write {loose[0]} into the memory of {wanted[loose[0]]}", where,
                            REBUILD, code="E-ENGINE-ALIAS")
    for name in (DECODE, PREFILL):
        _, profile = facts.profile(name)
        lacking = [tensor for tensor in (INPUT_IDS, PAST_LENGTHS, NEW_LENGTHS) if tensor not in profile.shapes]
        if lacking:
            raise InvalidBundle(f"the {name} profile does not name {lacking[0]}", where, REBUILD,
                                code="E-ENGINE-PROFILE")
    windows = manifest.window_cache
    if windows is not None and facts.max_prompt > windows.chunk:
        raise InvalidBundle(f"the engine takes {facts.max_prompt} new tokens at once, and its windowed layers keep "
                            f"room for {windows.chunk}", where, REBUILD, code="E-ENGINE-PROFILE")
    _check_plugin(facts, where)
    return facts


def _check_plugin(facts: EngineFacts, where: str) -> None:
    from gqa_plugins.grouped_attention import fields

    if facts.attention != "plugin":
        return
    if facts.plugin is None:
        raise InvalidBundle("the manifest does not name the plugin that the engine's attention needs", where, REBUILD,
                            code="E-ENGINE-PLUGIN-MISSING")
    known = facts.plugin.version if facts.plugin.version in fields.CREATION_OF else fields.PLUGIN_VERSION
    fields.check_contract_version(facts.plugin.contract_version, where, known)
    wanted = (facts.plugin.name, facts.plugin.version, facts.plugin.namespace)
    *others, last = fields.CREATION_OF
    here = (fields.NAME, f"{', '.join(others)} and {last}", fields.NAMESPACE)
    if wanted[1] not in fields.CREATION_OF or (wanted[0], wanted[2]) != (here[0], here[2]):
        raise InvalidBundle(f"the engine needs the plugin {wanted[2]}::{wanted[0]} version {wanted[1]}; this "
                            f"gqa-export has {here[2]}::{here[0]} version {here[1]}", where,
                            f"{REBUILD} of this version, or install the gqa-export that built it",
                            code="E-ENGINE-PLUGIN")


def _check_kernels(folder: Path, facts: EngineFacts) -> str:
    """Find the container of kernels in the engine and hold it against the manifest; what was found, in words."""
    from gqa_plugins.grouped_attention import fields

    assert facts.plugin is not None
    path = folder / facts.file
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(fields.MAGIC + b"\n")
        while start >= 0:
            header = data.find(b"\n\n", start) + 2
            rows = data[start: header].decode("ascii", errors="replace").split("\n")[1:-2]
            sizes = [row.partition(" ")[2] for row in rows]
            if all(size.isdigit() for size in sizes):
                container = data[start: header + sum(map(int, sizes))]
                if hashlib.sha256(container).hexdigest() == facts.plugin.sha256:
                    return f"{len(sizes)} kernels inside, {len(container) / 1e3:,.0f} kB, sha256 as stated"
            start = data.find(fields.MAGIC + b"\n", start + 1)
    raise InvalidBundle("the engine does not carry the kernels that its manifest names", str(path), REBUILD,
                        code="E-ENGINE-KERNELS")


def capabilities(facts: EngineFacts) -> str:
    """The GPUs an engine is for, in words."""
    numbers = [f"{number // 10}.{number % 10}" for number in facts.compute_capabilities]
    return f"compute capability {', '.join(numbers)}" if numbers else "the GPU it was built on"


def check_device(facts: EngineFacts, device: int, where: str) -> None:
    """Whether CUDA device number `device` is here and one that the engine is for."""
    fix = "copy the bundle to a machine with such a GPU and run the same command there"
    try:
        import torch
    except ImportError as error:
        raise NotCheckedHere("an engine's memory is held by PyTorch, which is not installed", where,
                             "pip install torch", code="E-ENV-TORCH") from error
    if not torch.cuda.is_available():
        raise NotCheckedHere(f"this machine cannot run the engine: PyTorch {torch.__version__} sees no CUDA device",
                             where, fix, code="E-ENV-GPU")
    if not 0 <= device < torch.cuda.device_count():
        raise GqaExportError(f"CUDA device {device} does not exist: {torch.cuda.device_count()} are here", where,
                             "count from 0", code="E-ENV-DEVICE")
    major, minor = torch.cuda.get_device_capability(device)
    if facts.compute_capabilities and 10 * major + minor not in facts.compute_capabilities:
        name = torch.cuda.get_device_name(device)
        raise InvalidBundle(f"the engine is for {capabilities(facts)}, this GPU ({name}) has {major}.{minor}", where,
                            f"build it again with --compute-capability {major}.{minor}",
                            code="E-ENGINE-COMPUTE-CAPABILITY")


def import_flavor(facts: EngineFacts, where: str) -> Any:
    """The Python module of the library that built the engine, in the very same version."""
    from importlib import import_module

    from ...environment import tensorrt_libraries

    here = [flavor for flavor in FLAVORS if tensorrt_libraries.is_there(flavor)]
    if here and facts.flavor not in here:
        extra = tensorrt_libraries.SOURCES[facts.flavor].extra
        raise GqaExportError(f"the engine is of {FLAVORS[facts.flavor]}, and only {FLAVORS[here[0]]} is installed",
                             where, f"pip install 'gqa-export[{extra}]', or build it again with --flavor {here[0]}",
                             code="E-ENV-FLAVOR")
    library = tensorrt_libraries.find(facts.flavor)
    tensorrt_libraries.preload(library)
    module = import_module(library.module)
    if module.__version__ != facts.version:
        raise InvalidBundle(f"the engine was built by {FLAVORS[facts.flavor]} {facts.version}, here is "
                            f"{module.__version__}: an engine runs only with the version that built it", where,
                            f"install version {facts.version}, or {REBUILD}", code="E-ENGINE-VERSION")
    return module
