"""A tiny model and a text to train it on."""

from __future__ import annotations

import random
from pathlib import Path

import gqa_models
import pytest
from small_text import SENTENCES, byte_tokenizer


@pytest.fixture(scope="session")
def student(tmp_path_factory) -> Path:
    """A two-layer Llama with a byte tokenizer; bf16 on disk."""
    folder = tmp_path_factory.mktemp("student") / "tiny"
    gqa_models.write_tiny("llama", folder, dtype="bfloat16", num_hidden_layers=2)
    byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def book(tmp_path_factory) -> Path:
    """Twenty thousand characters of few sentences."""
    chooser = random.Random(11)
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text("".join(chooser.choice(SENTENCES) for _ in range(400)))
    return path
