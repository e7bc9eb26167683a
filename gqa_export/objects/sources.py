"""What the public API takes where a checkpoint is expected: a place, or a model that a program holds in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .choices import Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..checkpoint.checkpoint import Checkpoint


@contextmanager
def opened(source: Place | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *,
           text_only: bool = False) -> Iterator[Place | Checkpoint]:
    """A place as it is; a model in memory as a checkpoint that is valid inside the block."""
    if isinstance(source, str | Path):
        yield source
        return
    from ..checkpoint.in_memory import memory_checkpoint

    with memory_checkpoint(source, tokenizer, text_only=text_only) as checkpoint:
        yield checkpoint


@contextmanager
def pickles_allowed(allow_pickle: bool) -> Iterator[None]:
    """Inside, weights may also be read from pickle files, if that is what the caller said."""
    from ..checkpoint.pickle_permission import Trust, trust, trusting

    with trusting(Trust(pickle=allow_pickle or trust().pickle)):
        yield


def path_of(place: Place | None) -> Path | None:
    """A place as a path; None stays None."""
    return None if place is None else Path(place)
