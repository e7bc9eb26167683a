"""The path that engines use, as scripts/gpu_check.py takes it: every way of launching makes the same driver calls."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from evidence import shipping_path

from .conftest import Programs

HERE = Path(__file__).parent
ADDRESS = re.compile(r"\b\d{10,}\b")  # of the host's memory, different in every process


def test_harness_is_compiled_from_what_cmake_compiles_it_from() -> None:
    """gpu_check compiles gqa_attend where there is no CMake."""
    cmake = (shipping_path.CPP / "CMakeLists.txt").read_text()
    wanted = set()
    for target in ("add_library(gqa_core", "add_library(gqa_attention", "add_executable(gqa_attend"):
        (listed,) = re.findall(re.escape(target) + r"([^)]*)\)", cmake)
        wanted.update(word for word in listed.split() if word.endswith(".cpp"))
    assert {str(path.relative_to(shipping_path.CPP)) for path in shipping_path.sources()} == wanted


def test_without_a_compiler_or_with_one_that_fails_the_reason_is_given(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    program, reason = shipping_path.build_harness(tmp_path)
    assert program is None
    assert reason.startswith("the harness did not compile")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    program, reason = shipping_path.build_harness(tmp_path)
    assert program is None
    assert "no C++ compiler" in reason


@pytest.fixture(scope="module")
def run(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[str]]:
    """(what the stage found, the launches that the driver saw)."""
    log = tmp_path_factory.mktemp("shipping") / "log"
    done = subprocess.run(
        [sys.executable, str(HERE / "shipping_program.py"), str(programs.folder / "bin" / "gqa_attend"),
         str(programs.libraries / "libcuda.so.1")], capture_output=True, text=True, timeout=120,
        env={**os.environ, "LD_LIBRARY_PATH": str(programs.libraries), "GQA_STUB_LOG": str(log),
             "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), [line for line in log.read_text().splitlines()
                                                      if line.startswith("launch")]


def test_every_way_is_run_and_judged(run: tuple[dict, list[str]]) -> None:
    found, _ = run
    assert [row["kernel"] for row in found["shipping"]] == [
        f"{case}, {way}" for case in ("decode", "prefill")
        for way in ("launched by ctypes", "launched by cuda-bindings", "C++ harness")]
    assert all(row["passed"] and row["same_bits"] for row in found["shipping"])
    assert found["shipping_note"] == "made up", "nothing was skipped"


def test_ctypes_cuda_bindings_and_cpp_launch_the_same_grids_with_the_same_numbers(run: tuple[dict, list[str]]) -> None:
    """Real cuda-bindings, too: what it hands to the driver is what ctypes and C++ hand over."""
    _, launches = run
    seen = [ADDRESS.sub("address", line) for line in launches]
    decode, prefill = seen[:9], seen[9:]
    for case, kernels in ((decode, ("append", "decode", "combine")), (prefill, ("append", "prefill"))):
        by_ctypes, by_bindings, by_cpp = (case[n * len(kernels):(n + 1) * len(kernels)] for n in range(3))
        assert [line.split()[1] for line in by_ctypes] == [f"{kernel}_kernel" for kernel in kernels]
        assert by_ctypes == by_bindings == by_cpp


@pytest.mark.parametrize("change", ["one bit", "not a number", "cache"])
def test_outcomes_that_differ_are_found(monkeypatch, change: str) -> None:
    """The judgement itself, with two ways that should agree and do not."""
    import torch
    from evidence import stub_gpu

    case = shipping_path.Case(4, 2, 16, 16, torch.bfloat16, ((9, 1), (0, 1)), 1)
    problem = shipping_path.make_problem(case, torch.device("cpu"))
    answers = stub_gpu._Answers(shipping_path, compiled=False)
    monkeypatch.setattr(shipping_path, "CASES", {"decode": case})
    monkeypatch.setattr(shipping_path, "make_problem", lambda *_: problem)
    monkeypatch.setattr(shipping_path, "files_of", answers.files_of)

    def outcome(which: int) -> dict:
        made = {"output": problem.expected.to(case.dtype), "past_key": problem.present_key.to(case.dtype),
                "past_value": problem.present_value.to(case.dtype)}
        if which == 1 and change == "one bit":
            made["output"].view(torch.int16).view(-1)[0] ^= 1
        elif which == 1 and change == "not a number":
            made["output"][0, 0, 0] = torch.nan
        elif which == 1:
            made["past_key"][0, 0, 9, 0] += 1
        return made

    numbers = iter(range(2))
    monkeypatch.setattr(shipping_path, "through_driver", lambda *_: outcome(next(numbers)))
    rows, _ = shipping_path.check("decode", torch.device("cpu"), 90, None, None, {"a": object, "b": object})
    assert [row["passed"] for row in rows] == [True, False]
