"""The manifest of a bundle, `gqa_export.json`: its fields, and reading it without trusting it.

A bundle is a folder with `model.onnx`, its weights, the manifest and the tokenizer's files.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import GqaExportError
from ..graph_io import TensorFact
from ..spec import Fallback, ModelSpec
from .engine_facts import EngineFacts
from .manifest_rules import check

MANIFEST = "gqa_export.json"
MODEL = "model.onnx"
DATA = "model.onnx.data"
FORMAT = 1
MOST_MANIFEST_BYTES = 1 << 26


@dataclass(frozen=True)
class FileFact:
    """A file of the bundle. Written by us: `sha256`. Linked or in place: `mtime_ns` and `header_sha256` (of the
    safetensors header) instead, and `sha256` only if asked for (`--hash`)."""

    size: int
    sha256: str = ""
    mtime_ns: int = 0
    header_sha256: str = ""


@dataclass(frozen=True)
class Manifest:
    """Everything a reader of a bundle may need, as `gqa_export.json`."""

    target: str
    dtype: str
    cache: str
    capacity: int
    logits: str
    weights: str
    spec: ModelSpec
    inputs: tuple[TensorFact, ...]
    outputs: tuple[TensorFact, ...]
    fallbacks: tuple[Fallback, ...] = ()
    files: dict[str, FileFact] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    """checkpoint (path or hub id), kind, stored dtype, max_positions and other facts of where it came from"""
    tokens: dict[str, Any] = field(default_factory=dict)
    """eos (list), bos, pad token ids; tokenizer: whether its files are here"""
    versions: dict[str, str] = field(default_factory=dict)
    bytes_copied: int = 0
    bytes_linked: int = 0
    engine: EngineFacts | None = None
    """of an engine bundle: its engine; None where the bundle holds a graph"""
    format: int = FORMAT

    def to_json(self) -> str:
        """Stable, readable JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST) -> Manifest:
        """Parse a manifest; anything malformed is a GqaExportError naming `where`."""
        fix = "export the bundle again with this version of gqa-export"
        try:
            data = json.loads(text, parse_constant=_no_constant)
            if data["format"] != FORMAT:
                raise GqaExportError(f"manifest format {data['format']!r} is not {FORMAT}", where, fix)
            check(data)
            data["spec"] = ModelSpec.from_dict(data["spec"])
            for name in ("inputs", "outputs"):
                data[name] = tuple(TensorFact(f["name"], f["dtype"], tuple(f["shape"])) for f in data[name])
            data["fallbacks"] = tuple(Fallback(**f) for f in data["fallbacks"])
            data["files"] = {name: FileFact(**fact) for name, fact in data["files"].items()}
            if data.get("engine") is not None:
                data["engine"] = EngineFacts.from_dict(data["engine"])
            return cls(**data)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise GqaExportError(f"not a valid bundle manifest: {type(error).__name__}: {error}", where, fix) from error


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def read_manifest(folder: Path | str) -> Manifest:
    """The manifest of a bundle folder, or a GqaExportError."""
    path = Path(folder) / MANIFEST
    fix = "make one with `gqa-export onnx CHECKPOINT -o BUNDLE`"
    if not Path(folder).is_dir():
        raise GqaExportError("no such bundle folder", str(folder), fix)
    if not path.is_file():
        raise GqaExportError(f"the folder has no {MANIFEST}, so it is not a bundle", str(folder), fix)
    try:
        if path.stat().st_size > MOST_MANIFEST_BYTES:
            raise GqaExportError(f"a manifest of {path.stat().st_size} bytes", str(path), "do not use this bundle")
        return Manifest.from_json(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise GqaExportError(f"cannot read the manifest: {error.strerror}", str(path),
                             "check its permissions") from error
    except UnicodeDecodeError as error:
        raise GqaExportError(f"not a valid bundle manifest: {error}", str(path), fix) from error


