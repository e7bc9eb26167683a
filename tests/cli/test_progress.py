"""Progress is for eyes: a line on a terminal; in a pipe one now and then, nothing of what is done in half a minute, and
no rich needed. Both tell how far it is, how fast it goes and what time is left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from gqa_models import write_tiny

from gqa_export.cli import main
from gqa_export.cli import progress as shown_progress
from gqa_export.cli.progress import LogBar
from gqa_export.progress import Bytes

GB = 10**9
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


class Clock:
    """Time that passes when it is told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(*reports: tuple[float, str, float | None, float | None]) -> list[str]:
    """What a log gets of reports, each after so many seconds of work in all."""
    clock, lines = Clock(), list[str]()
    bar = LogBar(lines.append, clock)
    for seconds, *report in reports:
        clock.now = 100.0 + seconds
        bar.report(*report)
    return lines


def test_a_log_gets_a_line_every_half_minute_with_the_pace_and_the_time_that_is_left() -> None:
    """A checkpoint of 13.5 GB at 40 MB/s takes more than five minutes: ten lines, and not one for each chunk."""
    total, rate = Bytes(135 * GB // 10), 40_000_000
    every = [(float(second), "writing weights", Bytes(second * rate), total) for second in range(0, 338)]
    lines = lines_of(*every)
    assert len(lines) == 11
    assert lines[0] == "writing weights: 1.2 of 13.5 GB, 40 MB/s, 5 min left\n"
    assert lines[-1] == "writing weights: 13.2 of 13.5 GB, 40 MB/s, 8 s left\n"


def test_what_is_counted_in_other_units_has_no_rate_and_each_task_a_pace_of_its_own() -> None:
    lines = lines_of((0, "tracing", None, None), (31, "tracing", None, None), (40, "measuring", 0, 226),
                     (70, "measuring", 30, 226), (71, "comparing", 0.0, 8.5), (101, "comparing", 2.0, 8.5),
                     (8000, "comparing", 2.2, 8.5))
    assert lines == ["tracing\n", "measuring: 30 of 226, 3 min left\n", "comparing: 24%, 2 min left\n",
                     "comparing: 26%, 6 h 18 min left\n"]


def test_what_a_killed_export_left_is_no_part_of_the_pace() -> None:
    """100 of 140 GB were there; the rest is written at 40 MB/s."""
    total, there, rate = Bytes(140 * GB), 100 * GB, 40_000_000
    lines = lines_of(*((second, "writing weights", Bytes(there + second * rate), total) for second in range(32)))
    assert lines == ["writing weights: 101.2 of 140.0 GB, 40 MB/s, 16 min left\n"]


@pytest.mark.parametrize(("rate", "words"), [(3_430, "3,430 MB/s"), (100, "100 MB/s"), (99, "99 MB/s"),
                                             (4, "4 MB/s"), (0.25, "0.25 MB/s")])
def test_rates_are_told_in_plain_figures(rate: float, words: str) -> None:
    total = Bytes(1000 * GB)
    (line,) = lines_of((0, "writing", Bytes(0), total), (30, "writing", Bytes(int(rate * 30e6)), total))
    assert f", {words}, " in line


def test_what_takes_less_than_half_a_minute_leaves_no_line() -> None:
    assert lines_of(*((second, "writing weights", Bytes(second), Bytes(29)) for second in range(30))) == []


UNHEARD = """
import sys
import click
from gqa_export import cli
from gqa_export.cli import progress
from gqa_export.errors import GqaExportError
progress.EVERY_S = 0.0
@click.command()
def work():
    with progress.progress("working") as bar:
        bar.report("working", 1, 2)
    if %r:
        raise GqaExportError("wrong", "here", "do otherwise", code="E-FILE-WRITE")
    click.echo("done")
cli.main.get_command = lambda ctx, name: work
sys.argv = ["gqa-export", "models"]
cli.entry()
"""


@pytest.mark.parametrize("where", ["a pipe whose reader is gone", "a full disk", "nowhere"])
@pytest.mark.parametrize(("fails", "code"), [(False, 0), (True, 2)], ids=["done", "refused"])
def test_what_cannot_be_told_on_standard_error_does_not_end_the_work(where: str, fails: bool, code: int) -> None:
    """Hours of work would end with the `tee` that keeps the log. The exit code is that of the work."""
    reader, writer = os.pipe()
    os.close(reader)
    unheard = writer if where == "a pipe whose reader is gone" else os.open("/dev/full", os.O_WRONLY)
    closed = "import os, sys; os.close(2); sys.stderr = None\n" if where == "nowhere" else ""
    done = subprocess.run([sys.executable, "-c", closed + UNHEARD % fails], stdout=subprocess.PIPE, stderr=unheard,
                          text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stdout) == (code, "" if fails else "done\n")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_terminal_that_is_closed_does_not_end_the_work() -> None:
    ours, theirs = os.openpty()
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
                              "input()\n" + CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs,
                             env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"})
    os.close(theirs)
    os.close(ours)
    assert child.communicate(b"\n", timeout=60)[0] == b"False\n", "it is no terminal any more"


def test_an_export_that_quantizes_tells_its_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that are written are counted, and quantizing happens while they are."""
    monkeypatch.setattr(shown_progress, "EVERY_S", 0.0)
    monkeypatch.setattr(shown_progress, "LEAST_S", 0.0)
    source = write_tiny("llama", tmp_path / "llama", num_hidden_layers=1)
    done = CliRunner().invoke(main, ["onnx", str(source), "-o", str(tmp_path / "b"), "--quantize", "int4",
                                     "--no-validate"])
    assert done.exit_code == 0, done.stderr
    last = [line for line in done.stderr.splitlines() if line.startswith("writing weights: ")][-1]
    written = next(line for line in done.stdout.splitlines() if "MB written" in line).split()[1]
    assert last.startswith(f"writing weights: {written} of {written} MB, ")
    assert last.endswith(" MB/s, 0 s left")
