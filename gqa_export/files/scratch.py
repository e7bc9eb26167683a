"""Temporary folders that do not outlive a killed process for long: the next run with the same purpose removes them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .resume import remove
from .staging import staging_folder


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """An empty folder among the temporary ones, for this user only, gone at the end.

    Args:
        purpose: part of its name; what killed processes left of the same purpose is removed first.
    """
    parent = Path(tempfile.gettempdir())
    try:
        import filelock  # noqa: F401 staging_folder needs it; doctor runs where nothing is installed
    except ImportError:
        with tempfile.TemporaryDirectory(prefix=f"gqa-export-{purpose}-") as name:
            yield Path(name)
        return
    with staging_folder(parent / f"gqa-export-{purpose}", parent) as (folder, left):
        folder.chmod(0o700)
        remove(left)  # at once: what is written now may need their room
        yield folder
