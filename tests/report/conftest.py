"""Verdicts on a scripted decoder, good and bad; a tiny Llama and its bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from compare.conftest import Scripted, scripted_verdict


def wrong(t, logits):
    if t == 60:
        logits[7] = np.nan


def wrong_key(t, key):
    if t == 50:
        key[1, 2] += 0.5


@pytest.fixture(scope="session")
def good():
    return scripted_verdict(Scripted(noise=1e-6))[0]


@pytest.fixture(scope="session")
def bad():
    """Not finite from token 60 on, in logits; a key wrong at token 50."""
    return scripted_verdict(Scripted(wrong, wrong_key))[0]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    from gqa_models import write_tiny

    return write_tiny("llama", tmp_path_factory.mktemp("checkpoint"), num_hidden_layers=2)


@pytest.fixture(scope="session")
def bundle(checkpoint, tmp_path_factory) -> Path:
    from gqa_export.pipeline import ExportOptions, export_onnx

    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    export_onnx(checkpoint, folder, ExportOptions(capacity=128))
    return folder
