"""sha256 of a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

READ_BYTES = 1 << 22


def file_sha256(path: Path) -> str:
    """sha256 of a file, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
