"""The memory of this process, and a budget for it: what will not fit is refused, growth beyond the limit stops it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..environment.machine import peak_bytes
from ..errors import GqaExportError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
         "TIB": 2**40}


def parse_size(text: str) -> int:
    """Bytes of a size as people write it: `1.5GB`, `800 MiB`, `1000000`.

    Raises:
        GqaExportError: the text is anything else.
    """
    size = bytes_of(text)
    if size is None:
        raise GqaExportError(f"invalid memory size {text!r}", "--max-ram", "write it like 1GB, 800MiB or 1000000000",
                             code="E-OPTION-MEMORY")
    return size


def bytes_of(text: str) -> int | None:
    """Bytes of a size as people write it; None where the text is anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?\s*", text.upper())
    if not match or (match.group(2) or "") not in {*UNITS, "B"}:
        return None
    return int(float(match.group(1)) * UNITS.get(match.group(2) or "", 1))


@dataclass(frozen=True)
class Budget:
    """A limit of the physical memory of this process.

    Attributes:
        limit: bytes; 0 is unlimited.
    """

    limit: int = 0

    def check(self, doing: str) -> None:
        """Raise GqaExportError if the process has grown beyond the limit. doing: the work, for the message."""
        peak = peak_bytes() if self.limit else 0
        if peak > self.limit:
            raise GqaExportError(f"{doing} took {peak / 1e9:.2f} GB of memory, --max-ram allows {self.limit / 1e9:.2f}",
                                 "--max-ram", "allow more; PyTorch and transformers alone take about 0.6 GB",
                                 code="E-ENV-MEMORY")

    def need(self, more: int, doing: str) -> None:
        """Raise GqaExportError, before it begins, for work that takes `more` bytes beyond what is occupied."""
        have = peak_bytes() if self.limit else 0
        if self.limit and have + more > self.limit:
            raise GqaExportError(f"{doing} needs {more / 1e9:.2f} GB beside the {have / 1e9:.2f} GB in use, --max-ram "
                                 f"allows {self.limit / 1e9:.2f} GB", "--max-ram",
                                 "allow more, or export a plain safetensors checkpoint: its tensors are streamed",
                                 code="E-ENV-MEMORY")
