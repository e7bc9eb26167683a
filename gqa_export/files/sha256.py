"""sha256 of files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

READ_BYTES = 1 << 22


def file_sha256(path: Path) -> str:
    """sha256 of a file, read piece by piece."""
    return files_sha256([path])


def files_sha256(paths: Iterable[Path]) -> str:
    """sha256 of the contents of files, one after the other, read piece by piece."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
    return digest.hexdigest()
