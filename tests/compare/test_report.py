"""What a verdict looks like on the terminal. Files: tests/report."""

from __future__ import annotations

import numpy as np
import pytest
from rich.console import Console

from gqa_export.report.console import details, print_verdict

from .conftest import Scripted, scripted_verdict


def wrong(t, logits):
    if t == 60:
        logits[7] = np.nan


@pytest.fixture(scope="module")
def good():
    return scripted_verdict(Scripted(noise=1e-6))[0]


@pytest.fixture(scope="module")
def bad():
    return scripted_verdict(Scripted(wrong))[0]


@pytest.mark.parametrize("width", [50, 120])
def test_the_terminal_says_where_it_first_diverged_and_ends_with_the_verdict(bad, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_verdict(bad, console)
    text = console.export_text()
    assert "first divergence: case teacher_forced, step 13 (decode), logits, batch 0, token 60, id 7: got nan" in text
    assert text.strip().splitlines()[-1].startswith("DIFFERENT: max |logit difference|")


def test_the_last_line_of_a_pass_says_so(good):
    assert details(good)[-1].startswith("PASSED: max |logit difference| to PyTorch float64")
