"""Measurements in stages: whatever is finished is kept, however the process ends; nothing else is."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from evidence.staged_run import DONE, FAILED, SKIPPED, STOPPED, Stage, run_stages

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"
NAMES = ("smoke", "core", "all", "rest")
PROGRAM = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from evidence.staged_run import Stage, run_stages
path = Path(sys.argv[2])

def save(results):
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(results))
    os.replace(scratch, path)

def stage(name):
    def run(results):
        print(name, flush=True)
        for _ in range(30):
            time.sleep(0.005)
        return {"rows": [name, name]}
    return Stage(name, 0.15, run)

results = json.loads(path.read_text()) if path.is_file() else {}
ended = run_stages([stage(name) for name in sys.argv[3:]], results, save)
print("table", *results.get("rows", []), flush=True)
sys.exit(0 if ended else 143)
"""


def start(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(SCRIPTS), str(path), *NAMES]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("after", range(len(NAMES)))
@pytest.mark.parametrize("delay", [0.0, 0.07])
def test_a_kill_loses_the_stage_it_falls_into_and_nothing_else(tmp_path: Path, number: signal.Signals, after: int,
                                                               delay: float) -> None:
    path = tmp_path / "results.json"
    process = start(path)
    assert process.stdout is not None
    for name in NAMES[:after + 1]:
        assert process.stdout.readline().strip() == name
    time.sleep(delay)
    process.send_signal(number)
    left, _ = process.communicate(timeout=60)
    written = json.loads(path.read_text()) if path.is_file() else {"stages": {}}
    done = [name for name, fact in written["stages"].items() if fact["status"] == DONE]
    assert done == list(NAMES[:len(done)])
    assert len(done) >= after
    assert written.get("rows", []) == [row for name in done for row in (name, name)], "whole stages only"
    if number == signal.SIGTERM and len(done) < len(NAMES):
        assert process.returncode == 143
        assert left.splitlines()[-1].split() == ["table", *written.get("rows", [])], "the table comes last all the same"
        assert list(written["stages"].values())[-1]["status"] in (DONE, STOPPED)
    again = start(path)
    told, _ = again.communicate(timeout=60)
    assert again.returncode == 0
    assert [line for line in told.splitlines() if line in NAMES] == list(NAMES[len(done):]), "the rest alone"
    assert json.loads(path.read_text())["rows"] == [row for name in NAMES for row in (name, name)]


def test_a_stage_that_does_not_fit_the_budget_is_skipped_and_a_shorter_one_after_it_is_run() -> None:
    ran: list[str] = []

    def stage(name: str, seconds: float) -> Stage:
        return Stage(name, seconds, lambda results: ran.append(name) or {})  # type: ignore[func-returns-value]

    results: dict = {}
    assert run_stages([stage("a", 5), stage("b", 500), stage("c", 5)], results, lambda _: None, budget_s=100)
    assert ran == ["a", "c"]
    assert [results["stages"][name]["status"] for name in "abc"] == [DONE, SKIPPED, DONE]
    assert results["stages"]["b"]["note"].startswith("about 500 s, ")
    run_stages([stage("a", 5), stage("b", 500), stage("c", 5)], results, lambda _: None)
    assert ran == ["a", "c", "b"], "resumed without a budget"


def test_a_stage_that_fails_is_reported_and_the_others_are_run() -> None:
    def broken(results: dict) -> dict:
        raise RuntimeError("no kernel image\nfor this device")

    results: dict = {"rows": [1]}
    saved: list[dict] = []
    stages = [Stage("broken", 1, broken), Stage("whole", 1, lambda found: {"rows": [2], "speed": len(found["rows"])})]
    assert run_stages(stages, results, lambda found: saved.append(json.loads(json.dumps(found))))
    assert results["stages"]["broken"]["status"] == FAILED
    assert results["stages"]["broken"]["note"] == "RuntimeError: no kernel image"
    assert (results["rows"], results["speed"]) == ([1, 2], 1)
    assert saved[0]["stages"]["broken"]["status"] == FAILED, "written at once"
