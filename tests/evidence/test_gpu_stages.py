"""The stages of `scripts/gpu_check.py` on a stub GPU: their order and estimates, and that no kill loses one that ended.

The stub (scripts/evidence/stub_gpu.py) replaces kernels, clock and graph; stages, files, tables and signals are real.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from evidence import gpu_stages, gpu_tools, stub_gpu
from evidence.staged_run import DONE, FAILED, STOPPED

pytest.importorskip("triton")
NAMES = ["smoke", "shipping path", "correctness", "bench core", "real model", "counters", "sanitizer", "bench rest"]
HELD = {"smoke": ("smoke", "graph"), "shipping path": ("shipping", "shipping_note"), "correctness": ("correctness",),
        "bench core": ("decode", "prefill", "ragged", "ceilings"), "real model": ("model", "model_speed"),
        "counters": ("counters",), "sanitizer": ("sanitizer",), "bench rest": ("decode", "prefill")}
"""what each stage adds to the results"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in for CUDA's driver."""
    if not any(map(gpu_tools.shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler for the stand-in of the CUDA driver")
    return stub_gpu.build_stub_driver(tmp_path_factory.mktemp("stub"))


@pytest.fixture
def script() -> ModuleType:
    return importlib.import_module("gpu_check")


@pytest.fixture
def stub(script: ModuleType, library: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The check with a stub GPU. The C++ harness is run by tests/cpp, which has compiled it."""
    from evidence import shipping_path

    monkeypatch.setattr(shipping_path, "build_harness", lambda _: (None, "the harness was not run"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    return lambda **options: stub_gpu.in_place_of_a_gpu(script, library, **options)


def test_stages_are_those_of_the_plan_and_fit_a_machine_that_is_lent_for_ten_minutes() -> None:
    assert list(gpu_stages.ESTIMATES) == NAMES
    seconds = list(gpu_stages.ESTIMATES.values())
    assert sum(seconds) <= 500
    assert sum(seconds[:4]) <= 210
    assert gpu_stages.ESTIMATES["sanitizer"] == gpu_tools.SANITIZER_S == 90, "its limit is its estimate"
    assert gpu_stages.ESTIMATES["counters"] == gpu_tools.COUNTERS_S


@pytest.mark.parametrize("only", [None, "correctness", "bench", "engines"])
@pytest.mark.parametrize("tensorrt", [False, True])
def test_estimates_of_the_stages_are_those_of_the_table(monkeypatch, only: str | None, tensorrt: bool) -> None:
    monkeypatch.setattr(gpu_stages, "has_tensorrt", lambda: tensorrt)
    monkeypatch.setattr(gpu_stages.os, "cpu_count", lambda: 16)
    options = SimpleNamespace(only=only, quick=False, jobs=0, heads=32, kv_heads=8, head_size=128)
    stages = gpu_stages.all_stages(options, SimpleNamespace(type="cuda"))
    names = [stage.name for stage in stages]
    assert names == [*gpu_stages.PARTS[only], *(["engines"] if only == "engines" or (not only and tensorrt) else [])]
    assert [stage.seconds for stage in stages] == [gpu_stages.ESTIMATES.get(name, gpu_stages.ENGINES_S)
                                                   for name in names]


def test_a_whole_run_writes_every_stage_and_prints_the_table_last(stub, script, tmp_path, capsys) -> None:
    with stub():
        assert script.main(["--out", str(tmp_path), "--jobs", "2"]) == 0
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(results["stages"]) == NAMES
    assert {fact["status"] for fact in results["stages"].values()} == {DONE}
    assert [row["kernel"] for row in results["shipping"] if "ctypes" in row["kernel"]] == [
        "decode, launched by ctypes", "prefill, launched by ctypes"]
    assert "the harness was not run" in results["shipping_note"], "said, not left out"
    assert results["ragged"][0]["batch"] == 3
    assert results["prefill"][0]["in_turn_ms"] == results["prefill"][0]["ours_ms"], "a constant clock shows both loops"
    peers = results["decode"][0]["peers"]
    assert set(peers) == {"sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flash-attn-3", "flash-attn", "flashinfer"}
    assert peers["flash-attn-3"] == "not installed"
    assert results["model_speed"]["passed"]
    assert results["model_speed"]["difference"] == 0
    assert results["counters"] == {"notes": ["ncu is not on the PATH"]}
    assert results["sanitizer"]["note"] == "compute-sanitizer is not on the PATH"
    told = capsys.readouterr().out.splitlines()
    table = next(n for n, line in enumerate(told) if line.startswith(stub_gpu.CARD))
    assert told[-1].startswith("written: ")
    assert len(told) - table > 10, "the table is the last thing but where it is written"
    page = (tmp_path / "gpu_check.md").read_text()
    for part in ("## Decode of a ragged batch", "in turn ms", "## A transformers model", "## Hardware counters",
                 "ncu is not on the PATH", "decode, launched by ctypes"):
        assert part in page


def in_a_fork(run: Callable[[], int]) -> int:
    """Run it in a copy of this process, which has imported everything already; its process id."""
    process = os.fork()
    if process:
        return process
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = run()
    except BaseException:
        code = 99
    os._exit(code)


def whole(results: dict[str, Any], complete: dict[str, Any]) -> list[str]:
    """Names of the stages that ended; checks that all they add is there, and nothing of the others."""
    done = [name for name, fact in results["stages"].items() if fact["status"] == DONE]
    assert done == NAMES[:len(done)]
    for part in {part for parts in HELD.values() for part in parts}:
        held = results[part]
        if isinstance(held, list):
            lengths = [len(complete[part]) if name != "bench rest" else len(complete[part]) - 1
                       for name in NAMES if part in HELD[name]]
            expected = 0
            if part in ("decode", "prefill"):
                expected = ("bench core" in done) + (len(complete[part]) - 1) * ("bench rest" in done)
            elif any(part in HELD[name] for name in done):
                expected = lengths[0]
            assert len(held) == expected, part
        else:
            assert bool(held) == any(part in HELD[name] for name in done), part
    return done


def test_killed_at_any_moment_the_results_of_every_stage_that_ended_are_there(stub, script, tmp_path) -> None:
    """Twenty moments over the whole run, SIGTERM and SIGKILL in turn; then one of them is taken up again."""
    with stub(pause_s=0.01):
        began = time.monotonic()
        assert script.main(["--out", str(tmp_path / "whole"), "--no-sanitizer"]) == 0
        needed = time.monotonic() - began
        complete = json.loads((tmp_path / "whole" / "gpu_check.json").read_text())
        counts, moments = set(), 20
        for moment in range(moments):
            folder = tmp_path / str(moment)
            process = in_a_fork(lambda folder=folder: script.main(["--out", str(folder), "--no-sanitizer"]))
            time.sleep(needed * (moment + 0.5) / moments)
            number = signal.SIGKILL if moment % 2 else signal.SIGTERM
            os.kill(process, number)
            ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            path = folder / "gpu_check.json"
            results = json.loads(path.read_text()) if path.is_file() else None
            if number == signal.SIGTERM and ended != 0:
                assert ended in (143, -signal.SIGTERM), "by our own handler, or before it was set up"
                assert (ended == 143) == (results is not None), "told to end, it writes what it has"
            if results is None:
                continue
            counts.add(len(whole(results, complete)))
            for fact in results["stages"].values():
                assert fact["status"] in (DONE, STOPPED)
            if ended != -signal.SIGKILL:
                assert (folder / "gpu_check.md").is_file()
        assert len(counts) >= 3, f"the moments fell into {sorted(counts)}"
        assert script.main(["--out", str(folder), "--resume", "--no-sanitizer"]) == 0
    resumed = json.loads((folder / "gpu_check.json").read_text())
    assert whole(resumed, complete) == NAMES


def test_a_stage_that_cannot_run_is_reported_and_the_run_is_not_a_success(stub, script, tmp_path, monkeypatch) -> None:
    from evidence import gpu_model

    def broken(*_: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(gpu_model, "check_model", broken)
    with stub():
        assert script.main(["--out", str(tmp_path)]) == 1
    stages = json.loads((tmp_path / "gpu_check.json").read_text())["stages"]
    assert stages["real model"]["status"] == FAILED
    assert "no kernel image" in stages["real model"]["note"]
    assert stages["bench rest"]["status"] == DONE


def test_damaged_results_are_not_resumed_and_not_a_crash(stub, script, tmp_path, capsys) -> None:
    (tmp_path / "gpu_check.json").write_text('{"card": ')
    with stub():
        assert script.main(["--out", str(tmp_path), "--resume", "--budget", "1"]) == 0
    assert "is not valid JSON" in capsys.readouterr().out
    stages = json.loads((tmp_path / "gpu_check.json").read_text())["stages"]
    assert {fact["status"] for fact in stages.values()} == {"skipped"}


def put_tool(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


COUNTED = """echo '==PROF== Connected to process 7'
echo '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
echo '"0","7","decode_kernel","dram__bytes.sum","Gbyte","2.15"'
echo '"0","7","decode_kernel","gpu__time_duration.sum","usecond","731.20"'"""
"""invented figures in the form of the tool's CSV"""


def test_counters_are_read_from_the_tool_s_table(tools: Path) -> None:
    put_tool(tools, "ncu", COUNTED)
    found = gpu_tools.counters()
    assert found["decode"] == found["prefill"] == {"DRAM bytes": "2.15 Gbyte", "duration": "731.20 usecond"}
    assert found["notes"] == []


def test_counters_that_may_not_be_read_are_said_to_be_missing(tools: Path) -> None:
    put_tool(tools, "ncu", "echo '==ERROR== ERR_NVGPUCTRPERM: no permission to read counters'; exit 1")
    found = gpu_tools.counters()
    assert set(found) == {"notes"}
    assert "exit 1: ERROR== ERR_NVGPUCTRPERM" in found["notes"][0]


@pytest.mark.parametrize(("text", "passed", "note"), [
    ("echo '========= ERROR SUMMARY: 0 errors'; echo '========= RACECHECK SUMMARY: 0 hazards'", True,
     "memcheck: ERROR SUMMARY: 0 errors; racecheck: RACECHECK SUMMARY: 0 hazards"),
    ("echo '========= ERROR SUMMARY: 2 errors'; exit 9", False, "memcheck: ERROR SUMMARY: 2 errors; racecheck did not"),
    ("echo '========= ERROR SUMMARY: 0 errors'; exit 1", False, "a case is wrong (exit 1)"),
    ("echo 'Device not supported'; exit 1", None, "memcheck did not run here (exit 1)")])
def test_sanitizer_passes_fails_or_did_not_run(tools: Path, text: str, passed: bool | None, note: str) -> None:
    put_tool(tools, "compute-sanitizer", text)
    found = gpu_tools.sanitize()
    assert found["passed"] is passed
    assert note in found["note"]


def test_a_sanitizer_that_does_not_end_is_ended_with_what_it_started(tools: Path, monkeypatch) -> None:
    put_tool(tools, "compute-sanitizer", f"sleep 60 & echo $! >> {tools}/child; wait")
    monkeypatch.setattr(gpu_tools, "SANITIZER_S", 0.5)
    began = time.monotonic()
    found = gpu_tools.sanitize()
    assert time.monotonic() - began < 20
    assert found["passed"] is None
    assert "memcheck did not end" in found["note"]
    child = int((tools / "child").read_text().split()[0])
    for _ in range(100):
        status = Path(f"/proc/{child}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("what the sanitizer started goes on")


def test_small_cases_of_the_sanitizer_hold_every_kind_of_kernel() -> None:
    import torch
    from evidence.gpu_child import CASES, small_cases

    cases = small_cases()
    assert len(cases) == CASES == 6
    assert {case.dtype for case in cases} == {torch.bfloat16, torch.float16, torch.float32}
    assert any(case.steps > 1 for case in cases)
    assert any(case.window and case.rotary for case in cases)
    assert any(case.softcap and case.sinks for case in cases)
