"""docs/embed-cpp.md: its program runs, its CMake file configures, its errors are those of the source."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from .conftest import HERE, PAGE, Programs, build_options, page_block, require_tools
from .toy_bundle import answer, continued, write_bundle

PLUGINS = HERE.parent.parent / "plugins" / "cpp"


def test_example_of_the_page_runs(tensorrt_programs: Programs, tmp_path: Path) -> None:
    if not (tensorrt_programs.libraries / "libnvinfer.so.11").exists():
        pytest.skip("the stand-in for TensorRT is for the headers of TensorRT 11")
    folder = write_bundle(tmp_path / "bundle", plugin=True)
    lines = tensorrt_programs.run("chat", folder, tensorrt_programs.plugin_library,
                                  GQA_STUB_TENSORRT_VERSION="11.1.0").splitlines()
    rows = [continued([3, 1, 4], 5), continued([1, 5], 5)]
    for row, tokens in enumerate(rows):
        assert [int(line.split()[-1]) for line in lines if line.startswith(f"row {row}:")] == tokens
    read = [3, 1, 4]
    for line in [line for line in lines if line.startswith("step")]:
        assert line == f"step: {answer(read)}"
        read.append(answer(read))
    assert len(read) == 6


def test_cmake_file_of_the_page_configures(tmp_path: Path) -> None:
    require_tools()
    (tmp_path / "CMakeLists.txt").write_text(page_block("cmake"))
    (tmp_path / "chat.cpp").write_text(page_block("cpp"))
    (tmp_path / "gqa-export").symlink_to(PLUGINS.parent.parent)
    done = subprocess.run(["cmake", "-S", str(tmp_path), "-B", str(tmp_path / "build"), *build_options()],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_missing_headers_stop_cmake_with_the_fix(tmp_path: Path) -> None:
    require_tools()
    done = subprocess.run(["cmake", "-S", str(PLUGINS), "-B", str(tmp_path), "-DTENSORRT_INCLUDE_DIR=NOTFOUND",
                           "-DCMAKE_FIND_ROOT_PATH=/nowhere", "-DCMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY"],
                          capture_output=True, text=True, timeout=120, env={"PATH": "/usr/local/bin:/usr/bin:/bin"})
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    assert "TensorRT's headers (NvInferRuntime.h) were not found." in said
    assert "fix: pass -DTensorRT_ROOT=FOLDER" in said


def test_every_error_of_the_page_is_in_the_source() -> None:
    """First column of the table: pieces in backticks, which the source spells (its literals joined)."""
    source = " ".join(re.sub(r'"\s*\+?\s*\n?\s*"', "", path.read_text(encoding="utf-8"))
                      for path in sorted(PLUGINS.rglob("*.cpp")))
    table = PAGE.read_text(encoding="utf-8").partition("## Errors")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")][1:]
    pieces = [piece for row in rows for piece in re.findall(r"`([^`]+)`", row)]
    assert len(pieces) > 20
    for library in ("libnvinfer.so", "libtensorrt_rtx.so", "libnccl.so.2"):
        pieces = [piece.replace(f"cannot load {library}", library) for piece in pieces]
    assert not [piece for piece in pieces if piece not in source]
