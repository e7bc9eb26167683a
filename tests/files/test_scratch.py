"""Temporary folders: what a killed process left is removed by the next run, and what is in use is not."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from refusal import refused

import gqa_export
from gqa_export.engine.build import EngineOptions
from gqa_export.errors import GqaExportError
from gqa_export.exporting import to_engine
from gqa_export.files import resume
from gqa_export.files.scratch import scratch_folder
from gqa_export.files.staging import writing_folder

ROOT = Path(gqa_export.__file__).parent

HELD = """
import sys, time
from gqa_export.files.scratch import scratch_folder
with scratch_folder(sys.argv[1]) as folder:
    (folder / "weights").write_bytes(bytes(1000))
    print(folder, flush=True)
    time.sleep(60)
"""

ENGINE = """
import sys, time
from pathlib import Path
from gqa_export.exporting import to_engine, to_onnx
def export(source, bundle, *_):
    bundle.mkdir()
    (bundle / "weights").write_bytes(bytes(1000))
    print("exported", flush=True)
    time.sleep(60)
to_engine.check_request = lambda *_: None
to_engine.for_code_types = to_engine.is_named = lambda *_, **__: None
to_onnx.export_onnx = export
to_engine.make_engine("some/checkpoint", Path(sys.argv[1]), to_engine.EngineOptions(), print)
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield tmp_path
    tempfile.tempdir = None


def start(code: str, *arguments: object) -> tuple[subprocess.Popen[str], str]:
    child = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    return child, child.stdout.readline().strip()


def kill(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=30)


def test_what_a_killed_process_left_is_removed_by_the_next_of_the_same_purpose(temporary) -> None:
    killed, left = start(HELD, "twin")
    living, used = start(HELD, "twin")
    try:
        kill(killed)
        assert Path(left, "weights").is_file()
        with scratch_folder("interpreted"):
            assert Path(left, "weights").is_file(), "of another purpose"
        with scratch_folder("twin") as folder:
            assert not Path(left).exists(), "gone before anything new is written"
            assert Path(used, "weights").is_file(), "its process lives"
            assert list(folder.iterdir()) == []
            if os.name == "posix":
                assert folder.stat().st_mode & 0o777 == 0o700
    finally:
        kill(living)
    with scratch_folder("twin"):
        pass
    assert list(temporary.iterdir()) == []


def test_the_bundle_that_a_killed_engine_build_left_is_removed_by_the_next(tmp_path, monkeypatch) -> None:
    output = tmp_path / "engine[7b]"
    child, _ = start(ENGINE, output)
    kill(child)
    assert len(list(tmp_path.rglob("weights"))) == 1

    def export(source: str, bundle: Path, *_: object) -> None:
        assert list(tmp_path.rglob("weights")) == []
        raise GqaExportError("stop", code="E-TEST")

    for check in ("check_request", "for_code_types", "is_named"):
        monkeypatch.setattr(to_engine, check, lambda *_, **__: None)
    monkeypatch.setattr("gqa_export.exporting.to_onnx.export_onnx", export)
    for place in (output, tmp_path / "new" / "deep" / "engine"):  # and folders that were made for it are gone too
        with refused("E-TEST"):
            to_engine.make_engine("some/checkpoint", place, EngineOptions(), lambda *_: None)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model[7b]", "a*b", "what?", "[!x]"])
def test_names_that_are_patterns_are_cleaned_and_match_themselves_alone(tmp_path, name) -> None:
    for output in (name, "modelb", "aXb"):
        folder = tmp_path / f".{output}.partial-left"
        folder.mkdir()
        (tmp_path / f"{folder.name}{resume.LOCK}").touch()
    with writing_folder(tmp_path / name, marker="marker") as staging:
        (staging / "marker").touch()
    assert {path.name for path in tmp_path.iterdir()} == {name, *(
        f".{output}.partial-left{end}" for output in ("modelb", "aXb") for end in ("", resume.LOCK))}


def test_no_temporary_folder_is_made_that_a_kill_leaves_for_good() -> None:
    makers = {"TemporaryDirectory", "mkdtemp"}
    found = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py")
             for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Attribute) and node.attr in makers}
    assert found == {"files/atomic_replace.py", "files/scratch.py"}, "use files.scratch"
