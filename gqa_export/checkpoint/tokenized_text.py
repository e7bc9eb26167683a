"""A text as tokens: read, checked, tokenized with a checkpoint's own tokenizer, cut into rows of one length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import GqaExportError, InvalidCheckpoint, cause_of

PIECE_CHARACTERS = 1 << 18


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


def read_text(path: Path) -> str:
    """The content of a UTF-8 file.

    Raises:
        GqaExportError: the file cannot be read, is not UTF-8, or holds white space only.
    """
    fix = "give an existing file of plain UTF-8 text"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise GqaExportError("the text is not UTF-8", f"{path}, byte {error.start}", fix,
                             code="E-FILE-TEXT-ENCODING") from error
    except OSError as error:
        raise GqaExportError(f"cannot read the text: {error.strerror}", str(path), fix,
                             code="E-FILE-TEXT-UNREADABLE") from error
    if not text.strip():
        raise GqaExportError("the text file is empty", str(path), fix, code="E-FILE-TEXT-EMPTY")
    return text


def tokenize(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids of a text, without special tokens; tokenized in pieces that end at line breaks.

    Args:
        tokenizer: a transformers tokenizer.
        text: any length.

    Returns:
        int32 [tokens].
    """
    found = []
    start = 0
    while start < len(text):
        end = min(start + PIECE_CHARACTERS, len(text))
        line = text.rfind("\n", start, end) if end < len(text) else -1
        end = line + 1 if line > start else end
        found.append(np.asarray(tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"],
                                dtype=np.int32))
        start = end
    return np.concatenate(found) if found else np.zeros(0, np.int32)


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
