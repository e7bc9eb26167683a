"""Answers that fit a JSON schema: tokens that cannot continue one are masked, by llguidance (the extra `guidance`)."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import GqaExportError, NotCheckedHere
from .text import JSON


class Guide:
    """A grammar over one answer. matcher: llguidance's. numpy: its module of masks. size: tokens that it knows."""

    def __init__(self, matcher: Any, numpy: Any, size: int) -> None:
        self._matcher, self._numpy = matcher, numpy
        self._mask: np.ndarray = numpy.allocate_token_bitmask(1, size)

    def mask(self, logits: np.ndarray) -> None:
        """Set the logits [vocabulary] of tokens that cannot come next to -infinity."""
        self._numpy.fill_next_token_bitmask(self._matcher, self._mask, 0)
        allowed = np.unpackbits(self._mask[0].view(np.uint8), bitorder="little")[: len(logits)].astype(bool)
        logits[: len(allowed)][~allowed] = -np.inf
        logits[len(allowed):] = -np.inf  # rows of the embedding that stand for no token

    def accept(self, token: int) -> bool:
        """Go on by a token that was chosen. Whether the answer is complete."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())


def json_guide(folder: Path, schema: Path, end_tokens: Collection[int]) -> Guide:
    """A guide to answers that fit a JSON schema.

    Args:
        folder: with the bundle's tokenizer.json.
        schema: the file.
        end_tokens: of the model.

    Raises:
        NotCheckedHere: llguidance is not installed.
        GqaExportError: the schema is not one that it takes, or the bundle's tokenizer is of another format.
    """
    try:
        import llguidance
        import llguidance.numpy as masks
    except ImportError as error:
        raise NotCheckedHere("answers by a JSON schema need llguidance", str(error),
                             "pip install 'gqa-export[guidance]'", code="E-ENV-LLGUIDANCE") from error
    if not (folder / JSON).is_file():
        raise GqaExportError(f"answers by a JSON schema need the tokenizer as {JSON}", str(folder),
                             "export a checkpoint that has one", code="E-RUN-TOKENIZER")
    try:
        text = schema.read_text(encoding="utf-8")
        json.loads(text)
        tokenizer = llguidance.LLTokenizer((folder / JSON).read_text(encoding="utf-8"),
                                           eos_token=min(end_tokens) if end_tokens else None)
        matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_json_schema(
            text, defaults={"whitespace_flexible": False}))  # else a small model writes blanks for ever
    except (ValueError, OSError, RecursionError) as error:
        raise GqaExportError(f"the JSON schema cannot be used: {error}", str(schema),
                             "give a file with a JSON schema", code="E-OPTION-JSON-SCHEMA") from error
    if matcher.is_error():
        raise GqaExportError(f"the JSON schema cannot be used: {matcher.get_error()}", str(schema),
                             "leave out what llguidance does not support", code="E-OPTION-JSON-SCHEMA")
    return Guide(matcher, masks, tokenizer.vocab_size)
