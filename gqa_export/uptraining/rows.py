"""The training and evaluation rows of a run: a text file or a data set, tokenized once, kept in the work folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.tokenized_text import load_tokenizer, packed, read_text, spread, tokenize
from ..errors import GqaExportError, InvalidCheckpoint, cause_of
from ..files.atomic_replace import move
from ..files.sha256 import files_sha256
from .options import UptrainOptions

HUB = "hub:"
TRAIN, EVAL = "train.npy", "eval.npy"


class Rows:
    """A data set of packed rows [N, length], read from the file as they are needed."""

    def __init__(self, path: Path, most: int = 0) -> None:
        rows = np.load(path, mmap_mode="r")
        self.rows = spread(rows, most) if most else rows

    def close(self) -> None:
        """No row is read any more: the file is let go, so that it can be removed (on Windows, only then)."""
        self.rows = np.empty((0, 0), np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        row = torch.from_numpy(self.rows[index].astype(np.int64))
        return {"input_ids": row, "labels": row}


def documents(spec: str) -> Iterator[str]:
    """The texts of a file (one), or of `hub:NAME[:CONFIG[:SPLIT]]`, a data set with a column `text`."""
    if not spec.startswith(HUB):
        yield read_text(Path(spec))
        return
    import datasets

    name, config, split = (spec.removeprefix(HUB).split(":") + ["", ""])[:3]
    try:
        data = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for example in data:
            yield str(example["text"])
    except Exception as error:  # the library raises anything for a missing name, configuration, split or column
        raise GqaExportError(f"the data set cannot be read: {cause_of(error)}", spec,
                             "give hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT of a data set with a column "
                             "text, or a text file", code="E-UPTRAIN-DATA-SET") from error


def content_of(spec: str) -> str:
    """What a text is, wherever it lies: sha256 of a file; a data set of the hub is known by its name."""
    if spec.startswith(HUB):
        return spec
    try:
        return files_sha256([Path(spec)])
    except OSError:
        read_text(Path(spec))  # says what is wrong with it
        raise


def tokens_of(spec: str, tokenizer: Any) -> np.ndarray:
    """Ids of all documents, an end token between them where the tokenizer has one."""
    end = getattr(tokenizer, "eos_token_id", None)
    parts: list[np.ndarray] = []
    for document in documents(spec):
        if parts and end is not None:
            parts.append(np.asarray([end], np.int32))
        parts.append(tokenize(tokenizer, document))
    if not parts:
        raise GqaExportError("the data set is empty", spec, "choose another split", code="E-UPTRAIN-DATA-EMPTY")
    return np.concatenate(parts)


def prepare(folder: Path, work: Path, options: UptrainOptions, vocabulary: int) -> None:
    """Tokenize and pack into the work folder, unless an earlier start of this run did."""
    if (work / EVAL).is_file():
        return
    tokenizer = load_tokenizer(folder)
    ids = tokens_of(options.text, tokenizer)
    if options.eval_text:
        train, held = ids, tokens_of(options.eval_text, tokenizer)
    else:
        cut = min(int(len(ids) * (1 - options.held_out)), max(len(ids) - options.length, 0))
        train, held = ids[:cut], ids[cut:]
    largest = int(max(ids.max(initial=0), held.max(initial=0)))
    if largest >= vocabulary:
        raise InvalidCheckpoint(f"the tokenizer gives the id {largest}, but the model's vocabulary has {vocabulary}",
                                str(folder), "the tokenizer does not belong to this checkpoint; copy the right one",
                                code="E-UPTRAIN-TOKENIZER")
    train, held = packed(train, options.length, options.text), packed(held, options.length,
                                                                      options.eval_text or options.text)
    np.save(work / TRAIN, train)
    np.save(work / f"partial-{EVAL}", held)
    move(work / f"partial-{EVAL}", work / EVAL)  # last, and at once: its presence means that both are whole
