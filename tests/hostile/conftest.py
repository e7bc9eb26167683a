"""A tiny sound checkpoint and its bundle, to be damaged in copies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import two_layers

from gqa_export.bundle.manifest import MANIFEST, FileFact, read_manifest
from gqa_export.files.sha256 import file_sha256

bundle, checkpoint = two_layers.bundle, two_layers.checkpoint


@pytest.fixture
def copied(bundle, tmp_path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copied"))


@pytest.fixture
def stolen(checkpoint, tmp_path) -> Path:
    """A copy of the checkpoint."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def sign(folder: Path) -> None:
    """Make the manifest's hashes and sizes true again: an attacker can."""
    manifest = read_manifest(folder)
    files = {name: FileFact((folder / name).stat().st_size, file_sha256(folder / name)) for name in manifest.files}
    (folder / MANIFEST).write_text(replace(manifest, files=files).to_json())


def edit_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))
