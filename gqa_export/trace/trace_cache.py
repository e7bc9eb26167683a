"""A cache of traces on disk: the second export of an architecture skips PyTorch altogether.

A trace holds no weights. It depends on the configuration, the options, this package's tracing code, the sources of
transformers that define the model, and the versions of what traces; all of it is in the key. It lies in
GQA_EXPORT_TRACE_CACHE ("off": none), by default `~/.cache/gqa-export/traces` (XDG_CACHE_HOME is honoured), and the
oldest go when there are more than `KEPT`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.cache_folder import cache_folder
from ..files.sha256 import files_sha256
from .modelling_sources import changed_in_memory, modelling_sources

if TYPE_CHECKING:
    from .traced import Traced

FOLDER = "GQA_EXPORT_TRACE_CACHE"
OFF = ("", "off", "0")
TRACERS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")
KEPT = 64


def folder() -> Path | None:
    """Where traces are kept; None if they are not to be."""
    named = os.environ.get(FOLDER)
    if named is not None:
        return None if named.lower() in OFF else Path(named)
    return cache_folder("traces")


def place_of(config: dict[str, Any], options: dict[str, Any]) -> Path | None:
    """Where the trace of this configuration (config.json as read) with these options is kept; None: nowhere, because
    the cache is off, the sources of the model are not where transformers keeps them, or they are not the code that this
    process runs."""
    there = folder()
    model = modelling_sources(config) if there is not None else None
    if there is None or model is None or changed_in_memory(config, model):
        return None
    package = Path(__file__).parent.parent
    sources = [*Path(__file__).parent.rglob("*.py"), *package.glob("*.py"), *(package / "checkpoint").glob("*.py"),
               package / "graph" / "rules.py"]
    code = [files_sha256(sorted(sources)), files_sha256(model), [path.name for path in model]]
    key = json.dumps([config, options, code, [version(name) for name in TRACERS]], sort_keys=True, default=str)
    return there / f"{hashlib.sha256(key.encode()).hexdigest()}.trace"


def load(place: Path) -> Traced | None:
    """The trace kept there, or None (also if the file is damaged)."""
    import onnx

    from ..spec import ModelSpec
    from .traced import Traced

    try:
        head, _, body = place.read_bytes().partition(b"\n")
        facts = json.loads(head)
        if hashlib.sha256(body).hexdigest() != facts.pop("sha256"):
            return None
        facts["spec"] = ModelSpec.from_dict(facts["spec"])
        facts["tied"] = tuple(tuple(group) for group in facts["tied"])
        traced = Traced(model=onnx.ModelProto.FromString(body), **facts)
        with contextlib.suppress(OSError):
            os.utime(place)  # the least recently used go first
        return traced
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(place: Path, traced: Traced) -> None:
    """Keep a trace; another process may be writing the same one, so the file appears at once. A cache that cannot
    be written (a full disk, a home that is read-only) does not fail the export."""
    body = traced.model.SerializeToString()
    facts = {name: value for name, value in vars(traced).items() if name != "model"}
    facts["spec"], facts["sha256"] = traced.spec.to_dict(), hashlib.sha256(body).hexdigest()
    name = ""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
            name = file.name
            file.write(json.dumps(facts).encode() + b"\n" + body)
        os.replace(name, place)
        _prune(place.parent)
    except OSError:
        with contextlib.suppress(OSError):
            if name:
                os.unlink(name)


def _prune(there: Path) -> None:
    traces = sorted(there.glob("*.trace"), key=lambda path: path.stat().st_mtime)
    for path in traces[:-KEPT]:
        path.unlink(missing_ok=True)
