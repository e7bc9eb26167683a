"""Long texts: no more of them is kept and tokenized than is used, and all of it is checked and hashed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from refusal import refused

from gqa_export.checkpoint.tokenized_text import (
    MOST_CHARACTERS,
    PIECE_CHARACTERS,
    read_beginning,
    read_text,
    tokenize,
)
from gqa_export.validation import suite_setting


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Characters of two bytes: a cut at a byte would be inside of one."""
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text("é" * (MOST_CHARACTERS + 3), encoding="utf-8")
    return path


def test_the_beginning_of_a_long_text_has_the_digest_of_the_whole(long: Path) -> None:
    found = read_beginning(long)
    assert found.text == "é" * MOST_CHARACTERS
    assert found.sha256 == hashlib.sha256(long.read_bytes()).hexdigest()
    assert not found.whole
    assert len(read_text(long)) == MOST_CHARACTERS + 3
    assert read_beginning(long, MOST_CHARACTERS + 3).whole
    assert read_beginning(long, 5).text == "é" * 5


def test_what_comes_behind_the_wanted_tokens_is_not_tokenized() -> None:
    given: list[int] = []

    def tokenizer(text: str, **_: object) -> dict[str, list[int]]:
        given.append(len(text))
        return {"input_ids": [ord(each) for each in text[:100]]}

    text = "ab" * PIECE_CHARACTERS
    few = tokenize(tokenizer, text, 150)
    assert len(given) == 2  # pieces of 100 tokens
    assert np.array_equal(few, tokenize(tokenizer, text)[:150])
    assert len(few) == 150


def test_a_byte_that_is_not_utf_8_is_found_wherever_it_is(long: Path, tmp_path: Path) -> None:
    path = tmp_path / "wrong.txt"
    path.write_bytes(long.read_bytes() + b"\xff")
    with refused("E-FILE-TEXT-ENCODING") as caught:
        read_beginning(path)
    assert caught.error.where.endswith(f"byte {2 * (MOST_CHARACTERS + 3)}")
    path.write_text(" \n" * PIECE_CHARACTERS)
    with refused("E-FILE-TEXT-EMPTY"):
        read_beginning(path)


def test_validation_tokenizes_the_beginning(long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = SimpleNamespace(text="")

    def encoded(_: Path, text: str) -> np.ndarray:
        given.text = text
        return np.arange(5)

    monkeypatch.setattr(suite_setting, "encoded", encoded)
    assert len(suite_setting.read_text(long.parent, long)) == 5
    assert given.text == "é" * MOST_CHARACTERS
