"""Builds plugins/cpp and the test programs once per run; skips, with the reason, where there is no compiler or CMake.

With TensorRT's headers (environment variable TENSORRT_ROOT or TensorRT_ROOT: a TensorRT folder, or a checkout of
NVIDIA/TensorRT) the plugin library and the TensorRT side of the runtime are built and tested too. GQA_EXPORT_CPP_BUILD
names a folder to build in and keep, for those who run these tests often.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "embed-cpp.md"
COMPILERS = ("c++", "g++", "clang++")


def tensorrt_root() -> str:
    return os.environ.get("TENSORRT_ROOT") or os.environ.get("TensorRT_ROOT") or ""  # noqa: SIM112 CMake's spelling


@dataclass(frozen=True)
class Programs:
    """What was built. `run` gives a program the stand-in for CUDA (and TensorRT, where there is one)."""

    folder: Path
    with_tensorrt: bool

    @property
    def libraries(self) -> Path:
        return self.folder / "lib"

    @property
    def plugin_library(self) -> Path:
        return self.libraries / "libgqa_plugin.so"

    def run(self, program: str, *arguments: str | Path, stdin: str = "", expect: int = 0,
            **environment: str | Path) -> str:
        """Standard output, and the exit code checked. environment: more variables, as keywords."""
        extra = {name: str(value) for name, value in environment.items()}
        done = subprocess.run([str(self.folder / "bin" / program), *map(str, arguments)], input=stdin, text=True,
                              capture_output=True, timeout=120,
                              env={**os.environ, "LD_LIBRARY_PATH": str(self.libraries), **extra})
        assert done.returncode == expect, f"{program} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def build_options() -> list[str]:
    if not tensorrt_root():
        return ["-DGQA_WITHOUT_TENSORRT=ON"]
    return [f"-DTensorRT_ROOT={tensorrt_root()}"]


def require_tools() -> None:
    if shutil.which("cmake") is None:
        pytest.skip("no CMake: pip install cmake")
    if not os.environ.get("CXX") and not any(map(shutil.which, COMPILERS)):
        pytest.skip("no C++17 compiler: install g++ or clang, or name one with CXX")


def call(command: Sequence[str | Path]) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"


def page_block(language: str) -> str:
    """The one block of that language in docs/embed-cpp.md."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return block


def write_example(path: Path) -> None:
    """The program of the documentation, left alone if it is there already: it is compiled with the tests' programs."""
    if not path.exists() or path.read_text() != page_block("cpp"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(page_block("cpp"))


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """Compiled with warnings as errors: a warning fails every test here."""
    require_tools()
    base = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        base = base.parent  # shared by all workers: the first builds, the others find it done
    build = Path(os.environ.get("GQA_EXPORT_CPP_BUILD") or base / "cpp-build")
    build.mkdir(parents=True, exist_ok=True)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    with open(build / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_example(build / "docs" / "chat.cpp")
        call(["cmake", "-S", HERE, "-B", build, *generator, "-DGQA_WARNINGS_ARE_ERRORS=ON", *build_options()])
        call(["cmake", "--build", build, "--parallel", "2"])
    return Programs(build, bool(tensorrt_root()))


@pytest.fixture(scope="session")
def tensorrt_programs(programs: Programs) -> Programs:
    """The same, where TensorRT's headers were at hand."""
    if not programs.with_tensorrt:
        pytest.skip("no TensorRT headers: set TENSORRT_ROOT to a TensorRT folder, or to a checkout of "
                    "https://github.com/NVIDIA/TensorRT (its include/ is enough)")
    return programs
