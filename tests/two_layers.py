"""Fixtures for folders whose tests need any good bundle: a tiny llama of two layers. Not to be changed: copy first."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """The checkpoint."""
    from gqa_models import write_tiny

    return write_tiny("llama", tmp_path_factory.mktemp("checkpoint"), num_hidden_layers=2)


@pytest.fixture(scope="session")
def bundle(checkpoint, tmp_path_factory) -> Path:
    """Its bundle for `ort`, capacity 128."""
    from gqa_export.exporting.options import ExportOptions
    from gqa_export.exporting.to_onnx import export_onnx

    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    export_onnx(checkpoint, folder, ExportOptions(capacity=128))
    return folder
