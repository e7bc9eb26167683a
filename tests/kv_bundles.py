"""Fixtures of tests of quantized caches: a text, tiny checkpoints with a tokenizer, their bundles, each made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gqa_models import write_tiny
from small_text import SENTENCES, byte_tokenizer

import gqa_export as gqa


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences to calibrate with."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(SENTENCES))
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoints(name) -> the tiny model's folder."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write_tiny(name, tmp_path_factory.mktemp(name) / "checkpoint", num_hidden_layers=2)
            byte_tokenizer(made[name])
        return made[name]

    return get


def bundles_of(**always: Any) -> Any:
    """A fixture: bundles(name, codes, **options) -> the bundle with a cache of these codes. always: more options."""
    @pytest.fixture(scope="module")
    def bundles(checkpoints: Callable[[str], Path], text: Path,
                tmp_path_factory: pytest.TempPathFactory) -> Callable[..., gqa.Bundle]:
        made: dict[tuple[Any, ...], gqa.Bundle] = {}

        def get(name: str = "llama", codes: str = "int8", **options: Any) -> gqa.Bundle:
            key = (name, codes, *sorted(options.items()))
            if key not in made:
                made[key] = gqa.export(checkpoints(name), tmp_path_factory.mktemp("b") / "bundle", capacity=64,
                                       kv_cache=codes, calibrate=text, **always, **options)
            return made[key]

        return get

    return bundles
