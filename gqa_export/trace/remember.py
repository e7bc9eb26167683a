"""A cache of traces on disk, for those who export one architecture often (continuous integration, several targets).

Off unless the environment variable GQA_EXPORT_TRACE_CACHE names a folder. A trace holds no weights and depends on
the configuration, the options, this package's tracing code and the versions of what traces; all of it is in the key.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import Traced

FOLDER = "GQA_EXPORT_TRACE_CACHE"
TRACERS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")


def place_of(config: Any, options: dict[str, Any]) -> Path | None:
    """Where the trace of this configuration with these options is kept; None if nothing is to be kept."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return None
    code = hashlib.sha256()
    for path in sorted([*Path(__file__).parent.rglob("*.py"), *Path(__file__).parent.parent.glob("*.py")]):
        code.update(path.read_bytes())
    key = json.dumps([config.to_dict(), type(config).__name__, options, code.hexdigest(),
                      [version(name) for name in TRACERS]], sort_keys=True, default=str)
    return Path(folder) / f"{hashlib.sha256(key.encode()).hexdigest()}.trace"


def load(place: Path) -> Traced | None:
    """The trace kept there, or None (also if the file is damaged)."""
    import onnx

    from ..spec import ModelSpec
    from . import Traced

    try:
        head, _, body = place.read_bytes().partition(b"\n")
        facts = json.loads(head)
        if hashlib.sha256(body).hexdigest() != facts.pop("sha256"):
            return None
        facts["spec"] = ModelSpec.from_dict(facts["spec"])
        facts["tied"] = tuple(tuple(group) for group in facts["tied"])
        return Traced(model=onnx.ModelProto.FromString(body), **facts)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(place: Path, traced: Traced) -> None:
    """Keep a trace; another process may be writing the same one, so the file appears at once."""
    body = traced.model.SerializeToString()
    facts = {name: value for name, value in vars(traced).items() if name != "model"}
    facts["spec"], facts["sha256"] = traced.spec.to_dict(), hashlib.sha256(body).hexdigest()
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
        file.write(json.dumps(facts).encode() + b"\n" + body)
    os.replace(file.name, place)
