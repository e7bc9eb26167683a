"""Progress is for eyes: a line on a terminal, nothing in a pipe, and no rich needed where there is none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import sys
from gqa_export.cli.progress import progress
with progress("writing weights", total=4) as bar:
    bar.report("writing more weights", 1, 4)
    bar.close()
print("rich" in sys.modules)
"""


def test_a_pipe_gets_nothing_and_rich_is_not_imported() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_terminal_shows_what_is_being_done() -> None:
    ours, theirs = os.openpty()
    child = subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=theirs,
                             env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"})
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 4096):
            shown += block
    except OSError:
        pass  # Linux reports the end of a pseudo-terminal as an input/output error
    os.close(ours)
    assert child.communicate()[0] == b"True\n"
    assert b"writing more weights" in shown
