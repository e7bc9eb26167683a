"""Bundles of tiny models for the TensorRT targets, exported once a process. Not to be changed: copy first."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import gqa_models
import onnx

from gqa_export.bundle.manifest import MANIFEST, MODEL, FileFact, read_manifest
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.files.sha256 import file_sha256

CAPACITY = 96


@cache
def checkpoint(name: str) -> Path:
    """The folder of a tiny checkpoint, fp32."""
    return gqa_models.write_tiny(name, Path(mkdtemp(prefix=f"gqa-{name}-")) / name)


@cache  # tells f(1) from f(a=1): positional arguments only, all given
def _bundle(name: str, target: str, dtype: str) -> Path:
    folder = Path(mkdtemp(prefix=f"gqa-{name}-{target}-")) / "bundle"
    export_onnx(checkpoint(name), folder, ExportOptions(target, dtype=dtype, capacity=CAPACITY))
    return folder


def bundle(name: str, target: str, dtype: str = "fp32") -> Path:
    """That checkpoint exported."""
    return _bundle(name, target, dtype)


def graph(folder: Path) -> onnx.ModelProto:
    """The model of a bundle, weights left in their file."""
    return onnx.load(str(folder / MODEL), load_external_data=False)


def changed(folder: Path, place: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of a bundle whose graph was changed by someone who also wrote the manifest."""
    shutil.copytree(folder, place)
    model = graph(place)
    change(model)
    onnx.save(model, str(place / MODEL))
    manifest = read_manifest(place)
    files = {name: FileFact((place / name).stat().st_size, file_sha256(place / name)) for name in manifest.files}
    (place / MANIFEST).write_text(replace(manifest, files=files).to_json())
    return place
