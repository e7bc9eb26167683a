"""Weights that a bundle shares with its checkpoint, and what happened to them after the export."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import gqa_models
import pytest
from refusal import refused

from gqa_export.bundle.integrity import check_files
from gqa_export.bundle.manifest import read_manifest
from gqa_export.errors import InvalidBundle
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.runtime.ort.session import OrtSession
from gqa_export.validation.validate import validate

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module", params=[("link", False), ("link", True), ("inplace", False), ("inplace", True)],
                ids=lambda param: f"{param[0]}-{'hashed' if param[1] else 'unhashed'}")
def exported(request, tmp_path_factory) -> tuple[Path, Path, bool]:
    """(checkpoint, bundle, whether the sha256 of the shared weights was recorded)."""
    mode, hashed = request.param
    root = tmp_path_factory.mktemp("shared")
    checkpoint = gqa_models.write_tiny("llama", root / "checkpoint")
    bundle = checkpoint if mode == "inplace" else root / "bundle"
    export_onnx(checkpoint, bundle, ExportOptions(weights=mode, hash_full=hashed))
    return checkpoint, bundle, hashed


@pytest.fixture
def shared(exported, tmp_path) -> tuple[Path, Path, bool]:
    """The same, in copies that keep the times."""
    checkpoint, bundle, hashed = exported
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    if bundle == checkpoint:
        return copy, copy, hashed
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint")), copy, hashed


def change_one_byte(path: Path) -> None:
    """As training on would: the same size, the same header."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def test_shared_weights_that_changed_after_the_export_are_refused_by_run_and_validate(shared):
    checkpoint, bundle, hashed = shared
    OrtSession.load(bundle, "cpu")
    change_one_byte(bundle / WEIGHTS)
    code = "E-BUNDLE-HASH" if hashed else "E-BUNDLE-MODIFIED"
    with refused(code, InvalidBundle):
        OrtSession.load(bundle, "cpu")
    with refused(code, InvalidBundle):
        validate(bundle, checkpoint, check_hashes=False)


def test_shared_weights_with_another_time_are_taken_only_where_a_hash_proves_them_unchanged(shared):
    _, bundle, hashed = shared
    os.utime(bundle / WEIGHTS, (1, 1))
    if hashed:
        check_files(bundle, read_manifest(bundle), hashes=False)
    else:
        with refused("E-BUNDLE-MODIFIED", InvalidBundle) as refusal:
            check_files(bundle, read_manifest(bundle), hashes=False)
        assert "--hash" in refusal.error.fix
