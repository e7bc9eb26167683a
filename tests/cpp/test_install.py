"""`cmake --install`; a project outside the tree finds the package, builds and runs over the toy engine, in C."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gqa_export.runtime.sampling import Sampling, pick

from .conftest import HERE, PAGE, Programs, call
from .toy_bundle import BATCH, CAPACITY, VOCABULARY, answer, continued, engine_facts, manifest


def call_out(command: list[str | Path]) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.fixture(scope="module")
def installed(programs: Programs, tmp_path_factory) -> Path:
    """The prefix of an installation that was moved after it was made, to a name with a space."""
    prefix = tmp_path_factory.mktemp("prefix")
    call(["cmake", "--install", programs.folder / "plugins", "--prefix", prefix / "first"])
    (prefix / "first").rename(prefix / "moved here")
    return prefix / "moved here"


@pytest.fixture(scope="module")
def consumer(installed: Path, programs: Programs, tmp_path_factory) -> Programs:
    build = tmp_path_factory.mktemp("consumer")
    call(["cmake", "-S", HERE / "consumer", "-B", build, f"-DCMAKE_PREFIX_PATH={installed}", f"-DTOY={HERE}",
          f"-DCMAKE_RUNTIME_OUTPUT_DIRECTORY={build}/bin", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build}/lib"])
    call(["cmake", "--build", build])
    return Programs(build, False)


def test_headers_libraries_and_both_kinds_of_package_files_are_installed(installed: Path) -> None:
    for place in ("include/gqa_export.h", "include/gqa/runtime/session.h", "include/gqa/runtime/sampling.h"):
        assert (installed / place).is_file()
    names = {path.name for path in installed.rglob("*") if path.is_file()}
    assert {"libgqa_runtime.a", "libgqa_core.a", "libgqa_c.a", "gqa_exportConfig.cmake", "gqa_exportTargets.cmake",
            "gqa_exportConfigVersion.cmake", "gqa_export.pc"} <= names
    assert not [path for path in installed.rglob("*.cmake") if str(HERE.parent.parent) in path.read_text()]


def test_a_project_outside_the_tree_serves_rows_from_c(consumer: Programs, tmp_path: Path) -> None:
    path = tmp_path / "gqa_export.json"
    path.write_text(manifest(engine_facts(True)).to_json())
    lines = consumer.run("use_c", path).splitlines()
    assert lines[0] == f"1 {VOCABULARY} {CAPACITY} {BATCH}"
    assert lines[1] == f"{answer([3, 1, 4])} {answer([1, 5])}"
    assert lines[2] == f"{answer([3, 9])} {answer([1, 5, 2])}"
    assert lines[3] == "3: 2 2 0 -1"
    assert lines[4].startswith("1 row 0 holds 2 tokens, and 9 are to be kept")
    assert [line.split(":")[0].strip() for line in lines[5:7]] == ["at", "fix"]
    assert [int(token) for token in lines[7].split()] == continued([3, 1, 4], 6)
    assert lines[8] == f"{answer([1, 5])} 2 1 1", "a second session beside the first"
    session, tokens, counts, getters = "\n".join(lines[9:]).split(" | ")
    assert session.startswith("1 the session is NULL")
    assert tokens.startswith("1 tokens is NULL")
    assert counts == "1", "three tokens, and no array of them"
    assert getters == "-1 0 -1"


def test_c_chooses_the_tokens_that_python_chooses(consumer: Programs) -> None:
    random, lines, expected = np.random.default_rng(2), [], []
    for number in range(400):
        logits = (random.standard_normal(60) * random.choice([0.1, 1, 6])).astype(np.float32)
        if number % 5 == 0:
            logits = np.round(logits)  # equal ones: the first counts as the larger
        sampling = Sampling(float(random.choice([0, 0.01, 0.7, 1, 3])), int(random.choice([0, 1, 5, 100])),
                            float(random.choice([1, 0.9, 0.3])), min_p=float(random.choice([0, 0.1, 1])))
        uniform = float(random.random())
        expected.append(pick(logits, sampling, uniform))
        numbers = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, uniform, *map(float, logits))
        lines.append(" ".join(map(repr, numbers)))
    assert len(set(expected)) > 30
    assert list(map(int, consumer.run("use_c", "choose", stdin="\n".join(lines) + "\n").split())) == expected


def test_compiled_code_asks_for_no_newer_libraries_than_the_page_says(consumer: Programs, programs: Programs) -> None:
    """Symbol versions of the C and C++ libraries; a newer compiler or C library binds newer ones."""
    if shutil.which("objdump") is None:
        pytest.skip("no objdump")
    if call_out(["c++", "-dumpversion"]).strip().split(".")[0] != "12" or "2.36" not in call_out(["ldd", "--version"]):
        pytest.skip("the page's figures are of GCC 12 and glibc 2.36 (Debian 12)")
    said = {name: tuple(map(int, version.split("."))) for name, version in
            re.findall(r"`(GLIBCXX|GLIBC)_([0-9.]+)`", PAGE.read_text(encoding="utf-8"))}
    files = [*(consumer.folder / "bin").iterdir(), *(programs.folder / "bin").iterdir(),
             *programs.folder.rglob("libgqa_*.so*")]
    asked: dict[str, tuple[int, ...]] = {}
    for file in files:
        for name, version in re.findall(r"\b(GLIBCXX|GLIBC)_([0-9.]+)", call_out(["objdump", "-T", file])):
            asked[name] = max(asked.get(name, (0,)), tuple(map(int, version.split("."))))
    assert len(files) > 3
    assert asked == said


def test_pkg_config_gives_the_flags_to_compile_and_link(installed: Path, tmp_path: Path) -> None:
    if shutil.which("pkg-config") is None or shutil.which("cc") is None:
        pytest.skip("no pkg-config, or no C compiler named cc")
    (place,) = installed.rglob("pkgconfig")
    done = subprocess.run(["pkg-config", "--cflags", "--libs", "gqa_export"], capture_output=True, text=True,
                          env={"PKG_CONFIG_PATH": str(place), "PATH": "/usr/local/bin:/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    program = tmp_path / "choose.c"
    program.write_text('#include <gqa_export.h>\nint main(void) {\n  float l[3] = {0, 2, 1};\n'
                       "  gqa_sampling s = {0, 0, 1, 0};\n  return gqa_choose(l, 3, &s, 0.5);\n}\n")
    strict = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    call(["cc", *strict, program, "-o", tmp_path / "choose", *shlex.split(done.stdout), "-lm"])
    assert subprocess.run([tmp_path / "choose"]).returncode == 1
