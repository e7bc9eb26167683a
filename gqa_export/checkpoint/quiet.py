"""transformers without its progress bars and warnings."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[list[str]]:
    """No progress bars, load reports or warnings of transformers: they are collected in the list instead.

    Its settings are restored afterwards.
    """
    from transformers.utils import logging as hf

    messages: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    printing = logging.getLogger("transformers").handlers[:]
    hf.set_verbosity(logging.WARNING)
    hf.disable_default_handler()
    hf.add_handler(listener)
    hf.disable_progress_bar()
    try:
        yield messages
    finally:
        hf.remove_handler(listener)
        logging.getLogger("transformers").handlers[:] = printing  # none of them within another `quiet`
        hf.set_verbosity(level)
        if bars:
            hf.enable_progress_bar()
