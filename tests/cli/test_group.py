"""The command line as a whole: which exit code, which message, and no traceback unless it is asked for."""

from __future__ import annotations

import errno
import subprocess
import sys
import tempfile
import types

import click
import pytest
from click.testing import CliRunner

from gqa_export import __version__, cli
from gqa_export.errors import GqaExportError, NotCheckedHere


@pytest.fixture
def run(monkeypatch):
    """Run `gqa-export ARGUMENTS` in this process with one more verb, `fail`, that raises what it is given."""

    def runner(arguments: list[str], error: BaseException | None = None):
        @click.command()
        def command() -> None:
            """Raise."""
            if error is not None:
                raise error
            click.echo("fine")

        module = types.ModuleType("gqa_export.cli.fail")
        module.command = command
        monkeypatch.setitem(sys.modules, "gqa_export.cli.fail", module)
        monkeypatch.setitem(cli.VERBS, "fail", "Fail.")
        return CliRunner().invoke(cli.main, arguments)

    return runner


def process(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "gqa_export", *arguments], capture_output=True, text=True, timeout=120)


def test_help_lists_every_verb_with_its_line(run) -> None:
    result = run(["--help"])
    assert result.exit_code == 0
    for verb, line in cli.VERBS.items():
        assert verb in result.stdout
        assert line.split()[0] in result.stdout


def test_success_is_0(run) -> None:
    result = run(["fail"])
    assert (result.exit_code, result.stdout, result.stderr) == (0, "fine\n", "")


def test_unknown_verb_is_2_and_says_so(run) -> None:
    result = run(["nonsense"])
    assert result.exit_code == 2
    assert "nonsense" in result.stderr


def test_refusal_is_2_with_cause_place_and_fix_and_no_traceback(run) -> None:
    result = run(["fail"], GqaExportError("no such thing", "there", "do this"))
    assert result.exit_code == 2
    assert result.stderr == "error: no such thing\n  at:  there\n  fix: do this\n"
    assert result.stdout == ""


def test_what_cannot_be_checked_here_is_3(run) -> None:
    assert run(["fail"], NotCheckedHere("no GPU")).exit_code == 3


@pytest.mark.parametrize("arguments", [["--debug", "fail"], ["fail", "--debug"]], ids=["before", "after"])
def test_debug_shows_the_traceback_before_or_after_the_verb(run, arguments) -> None:
    result = run(arguments, GqaExportError("no such thing"))
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("error: no such thing\n")


def test_debug_is_forgotten_by_the_next_call(run) -> None:
    run(["--debug", "fail"], GqaExportError("first"))
    assert "Traceback" not in run(["fail"], GqaExportError("second")).stderr


def test_a_bug_is_70_in_one_line_and_its_traceback_is_in_a_file(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = run(["fail"], KeyError("secret"))
    assert result.exit_code == 70
    assert result.stderr.splitlines()[0] == "error: KeyError: 'secret'"
    assert "Traceback" not in result.stderr
    [kept] = tmp_path.glob("gqa-export-traceback-*.txt")
    assert str(kept) in result.stderr
    assert "Traceback (most recent call last)" in kept.read_text()
    assert "KeyError: 'secret'" in kept.read_text()


def test_a_bug_where_no_file_can_be_written_asks_for_debug(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "is not there"))
    result = run(["fail"], KeyError("secret"))
    assert result.exit_code == 70
    assert "rerun with --debug" in result.stderr


def test_a_refusal_with_a_code_shows_it(run) -> None:
    result = run(["fail"], GqaExportError("no such thing", code="E-OPTION-THING"))
    assert result.stderr == "error: no such thing\n  code: E-OPTION-THING\n"


def test_interruption_is_130(run) -> None:
    result = run(["fail"], KeyboardInterrupt())
    assert result.exit_code == 130
    assert result.stderr == "error: interrupted\n"


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")])
def test_no_memory_is_said_in_words(run, error) -> None:
    result = run(["fail"], error)
    assert result.exit_code == 2
    assert "no memory left" in result.stderr
    assert "bug" not in result.stderr


def test_missing_package_names_the_extra_that_brings_it(run) -> None:
    result = run(["fail"], ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"))
    assert result.exit_code == 2
    assert "pip install 'gqa-export[ort]'" in result.stderr


def test_missing_package_outside_the_extras_is_named(run) -> None:
    result = run(["fail"], ModuleNotFoundError("No module named 'tiktoken'", name="tiktoken"))
    assert "pip install 'tiktoken'" in result.stderr


def test_clicks_own_failures_are_2_because_1_means_different(run) -> None:
    assert run(["fail"], click.FileError("x", "no")).exit_code == 2


def test_a_reader_that_went_away_is_no_error_message(run) -> None:
    result = run(["fail"], BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert (result.exit_code, result.stderr) == (141, "")


def test_the_program_prints_its_version() -> None:
    done = process("--version")
    assert done.returncode == 0
    assert done.stdout == f"gqa-export, version {__version__}\n"


def test_the_program_hands_the_exit_code_on() -> None:
    done = process("inspect", "there-is-no-such-checkpoint")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no such file or folder\n  at:  there-is-no-such-checkpoint\n  fix: ")
    assert "Traceback" not in done.stderr


def test_the_program_flushes_what_it_wrote_before_it_leaves() -> None:
    done = process("--help")
    assert done.returncode == 0
    assert done.stdout.rstrip().endswith(list(cli.VERBS.values())[-1].split()[-1])


def test_a_function_in_one_block_is_the_function() -> None:
    def add(one: int, *, other: int) -> int:
        return one + other

    assert cli.in_one_block(add)(2, other=3) == 5
    with pytest.raises(ZeroDivisionError):
        cli.in_one_block(lambda: 1 // 0)()


def test_a_collection_is_possible_after_none_was(monkeypatch) -> None:
    import gc
    import weakref

    from gqa_export.cli.onnx import no_collection

    class Node:
        pass

    with no_collection():
        assert not gc.isenabled()
        node = Node()
        node.itself, known = node, weakref.ref(node)
        del node
        assert known() is not None
    assert gc.isenabled()
    gc.collect()
    assert known() is None, "what was made meanwhile is not kept for ever"
