"""A text file that is replaced as a whole."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from ..errors import GqaExportError
from .atomic_replace import move


def write_text(path: Path, text: str) -> None:
    """Write a whole file or leave the old one: it appears at once.

    Raises:
        GqaExportError: the file cannot be written.
    """
    staged = ""
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.absolute().parent, prefix=f".{path.name}.",
                                         delete=False) as file:
            staged = file.name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(staged, 0o644)
        move(Path(staged), path)
    except OSError as error:
        raise GqaExportError(f"cannot write the file: {error.strerror}", str(path),
                             "free some space, or name another file", code="E-FILE-WRITE") from error
    finally:
        with suppress(OSError):
            if staged:
                os.unlink(staged)
