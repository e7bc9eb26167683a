"""Bundles with rounded inputs, which several files of tests read and none changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from gqa_models import write_tiny
from small_text import SENTENCES, byte_tokenizer

from .rounded_bundles import exported, static


@pytest.fixture(scope="session")
def fp8(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint and its bundle."""
    folder = tmp_path_factory.mktemp("fp8")
    checkpoint = static(folder / "checkpoint", "ModelOpt FP8")
    return checkpoint, exported(checkpoint, folder / "bundle").folder


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint with a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("plain")
    write_tiny("llama", folder / "checkpoint", num_hidden_layers=1)
    byte_tokenizer(folder / "checkpoint")
    (folder / "text.txt").write_text("".join(SENTENCES) * 8)
    return folder / "checkpoint", folder / "text.txt"


@pytest.fixture(scope="session")
def calibrated(plain, tmp_path_factory) -> Path:
    """A bundle of FP8 whose scales of inputs a text gave."""
    return exported(plain[0], tmp_path_factory.mktemp("calibrated") / "b", quantize="fp8", calibrate=plain[1]).folder
