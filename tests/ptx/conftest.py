"""Kernels are compiled here: not in a process that interprets them."""

from __future__ import annotations

import pytest
from gqa_plugins.grouped_attention import plan

pytest.importorskip("triton")


@pytest.fixture(scope="session", autouse=True)
def _compiling() -> None:
    if plan.interpreting():
        pytest.skip("Triton interprets in this process and cannot compile: run tests/ptx in one of its own")
