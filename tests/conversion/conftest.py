"""Small checkpoints for the tests of `convert`."""

from __future__ import annotations

from pathlib import Path

import gqa_models
import pytest
from small_text import SENTENCES, byte_tokenizer

from gqa_export.checkpoint.load_model import load_model


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Some thousand characters, not periodic."""
    import random

    chooser = random.Random(5)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(chooser.choice(SENTENCES) for _ in range(200)))
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(name, **overrides) -> a checkpoint folder with a byte tokenizer, made once."""
    made: dict = {}

    def make(name: str, dtype: str = "float32", **overrides) -> Path:
        key = (name, dtype, *sorted(overrides.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("tiny") / name
            gqa_models.write_tiny(name, folder, dtype=dtype, **overrides)
            byte_tokenizer(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def logits():
    """logits(folder) -> [2, 40, vocabulary] fp32 of seeded tokens."""
    import torch

    from gqa_export.checkpoint.open import open_checkpoint

    def run(folder: Path) -> torch.Tensor:
        model = load_model(open_checkpoint(folder), "fp32")
        ids = torch.randint(4, 250, (2, 40), generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            return model(ids).logits  # type: ignore[operator]

    return run
