"""A refusal that a test expects, told by its code: words may be changed, codes may not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from gqa_export.errors import GqaExportError


@contextmanager
def refused(code: str, kind: type[GqaExportError] = GqaExportError) -> Iterator[Any]:
    """Expect a GqaExportError of `kind` with this code; what is given has it as `.error` after the block."""
    found = SimpleNamespace(error=None)
    with pytest.raises(kind) as caught:
        yield found
    found.error = caught.value
    assert caught.value.code == code, f"{caught.value.code} instead of {code}: {caught.value}"
