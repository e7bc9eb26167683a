"""The committed JSON schemas are those of the definitions."""

from __future__ import annotations

import pytest
import write_schemas


@pytest.mark.parametrize("path", list(write_schemas.schemas()), ids=lambda path: path.name)
def test_a_committed_schema_is_the_one_that_its_definition_gives(path):
    assert path.read_text(encoding="utf-8") == write_schemas.text(write_schemas.schemas()[path]), (
        "run python scripts/write_schemas.py")
