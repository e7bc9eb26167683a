"""A text as tokens: read, checked, tokenized with a checkpoint's own tokenizer, cut into rows of one length."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import GqaExportError, InvalidCheckpoint, cause_of

PIECE_CHARACTERS = 1 << 18
MOST_CHARACTERS = 1 << 22
"""that are tokenized where some thousand tokens of a text are used: seconds, however long the text is"""
FIX = "give an existing file of plain UTF-8 text"


def load_tokenizer(folder: Path, gguf_file: Path | None = None) -> Any:
    """The tokenizer of a checkpoint folder, or of a GGUF file in it, without running any code of the checkpoint.

    Raises:
        InvalidCheckpoint: transformers cannot load one from the folder.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False,
                                             **({"gguf_file": gguf_file.name} if gguf_file else {}))
    except Exception as error:  # transformers raises anything between OSError and KeyError for a missing tokenizer
        raise InvalidCheckpoint(f"transformers cannot load the checkpoint's tokenizer: {cause_of(error)}",
                                str(folder), "copy tokenizer.json and tokenizer_config.json into the folder",
                                code="E-CKPT-TOKENIZER") from error


class Beginning(NamedTuple):
    """The first characters of a text. sha256: of the whole text. whole: there are no more."""

    text: str
    sha256: str
    whole: bool


def read_beginning(path: Path, characters: int = MOST_CHARACTERS) -> Beginning:
    """The first characters of a UTF-8 file. All of it is checked, piece by piece.

    Raises:
        GqaExportError: the file cannot be read, is not UTF-8, or holds white space only.
    """
    digest, kept, count, blank = hashlib.sha256(), [], 0, True
    try:
        with Path(path).open(encoding="utf-8") as file:
            while piece := file.read(PIECE_CHARACTERS):
                digest.update(piece.encode())
                blank = blank and not piece.strip()
                if count < characters:
                    kept.append(piece[: characters - count])
                count += len(piece)
    except UnicodeDecodeError as error:
        raise GqaExportError("the text is not UTF-8", f"{path}, byte {_first_wrong(path)}", FIX,
                             code="E-FILE-TEXT-ENCODING") from error
    except OSError as error:
        raise GqaExportError(f"cannot read the text: {error.strerror}", str(path), FIX,
                             code="E-FILE-TEXT-UNREADABLE") from error
    if blank:
        raise GqaExportError("the text file is empty", str(path), FIX, code="E-FILE-TEXT-EMPTY")
    return Beginning("".join(kept), digest.hexdigest(), count <= characters)


def _first_wrong(path: Path) -> int:
    """The first byte of a file that is not UTF-8: a decoder of pieces counts from the beginning of its piece."""
    try:
        Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0


def read_text(path: Path) -> str:
    """The content of a UTF-8 file. Raises as `read_beginning`."""
    return read_beginning(path, sys.maxsize).text


def tokenize(tokenizer: Any, text: str, most: int = sys.maxsize) -> np.ndarray:
    """Token ids of a text, without special tokens; tokenized in pieces that end at line breaks.

    Args:
        tokenizer: a transformers tokenizer.
        text: any length.
        most: tokens that are wanted; what comes behind them is not tokenized.

    Returns:
        int32 [tokens], at most `most`.
    """
    found: list[np.ndarray] = []
    start = 0
    while start < len(text) and sum(map(len, found)) < most:
        end = min(start + PIECE_CHARACTERS, len(text))
        line = text.rfind("\n", start, end) if end < len(text) else -1
        end = line + 1 if line > start else end
        found.append(np.asarray(tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"],
                                dtype=np.int32))
        start = end
    return np.concatenate(found)[:most] if found else np.zeros(0, np.int32)


def packed(ids: np.ndarray, length: int, where: str) -> np.ndarray:
    """Token ids cut into rows of one length, without padding; the remainder is dropped.

    Args:
        ids: [tokens].
        length: tokens per row.
        where: the text's file, for the message.

    Returns:
        [tokens // length, length].

    Raises:
        GqaExportError: the text does not fill one row.
    """
    rows = len(ids) // length
    if not rows:
        raise GqaExportError(f"the text has {len(ids)} tokens, fewer than one row of {length}", where,
                             "give a longer text, or a smaller --length", code="E-FILE-TEXT-SHORT")
    return ids[: rows * length].reshape(rows, length)


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the rows [rows, length], evenly spread over all."""
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]
