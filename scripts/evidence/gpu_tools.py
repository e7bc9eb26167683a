"""NVIDIA's tools on a few launches: hardware counters (Nsight Compute), memory errors and races (compute-sanitizer).

A tool that is not on the PATH, is not allowed here, or does not end in time is reported with the reason: it neither
passes nor fails. Standard library only.
"""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHILD = Path(__file__).resolve().parent / "gpu_child.py"
SANITIZER_S, COUNTERS_S = 90.0, 40.0  # of both tools of the sanitizer; of both kernels' counters
TOOLS = {"memcheck": "ERROR SUMMARY", "racecheck": "RACECHECK SUMMARY"}
FAULTS_FOUND = 9  # the exit code that compute-sanitizer is asked for
METRICS = {"gpu__time_duration.sum": "duration", "dram__bytes.sum": "DRAM bytes",
           "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM, % of peak",
           "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor cores, % of peak",
           "sm__warps_active.avg.pct_of_peak_sustained_active": "warps, % of peak",
           "launch__registers_per_thread": "registers"}
KERNELS = {"decode": "decode_kernel", "prefill": "prefill_kernel"}


class Ended:
    """A command that has ended: its exit code (None if it was stopped at the limit) and its standard output."""

    def __init__(self, code: int | None, output: str) -> None:
        self.code, self.output = code, output


def run_limited(command: Sequence[str], seconds: float) -> Ended:
    """Run it, and end it with everything it started when the time is over or this process is interrupted."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True)
    try:
        output, _ = process.communicate(timeout=seconds)
        return Ended(process.returncode, output)
    except subprocess.TimeoutExpired:
        return Ended(None, "")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def sanitize(wanted: bool = True) -> dict[str, Any]:
    """Six small cases under memcheck, then racecheck, within SANITIZER_S together."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or not wanted:
        return {"passed": None, "note": "compute-sanitizer is not on the PATH" if wanted else "not asked for"}
    until = time.monotonic() + SANITIZER_S
    notes, passed = [], []
    for name, summary in TOOLS.items():
        left = until - time.monotonic()
        ended = run_limited([tool, "--tool", name, "--error-exitcode", str(FAULTS_FOUND), sys.executable, str(CHILD),
                             "cases"], max(left, 0.1))
        line = next((line for line in reversed(ended.output.splitlines()) if summary in line), "")
        if ended.code is None:
            notes.append(f"{name} did not end within the {SANITIZER_S:.0f} s of both")
        elif not line:
            notes.append(f"{name} did not run here (exit {ended.code})")
        else:
            passed.append(ended.code == 0)
            notes.append(f"{name}: {line.strip('= ')}" + ("" if ended.code in (0, FAULTS_FOUND)
                                                          else f", a case is wrong (exit {ended.code})"))
    return {"passed": all(passed) if passed else None, "note": "; ".join(notes)}


def counters() -> dict[str, Any]:
    """Kernel -> what it did -> the value with its unit, of one launch each; notes says what was not read."""
    tool = shutil.which("ncu")
    if tool is None:
        return {"notes": ["ncu is not on the PATH"]}
    found: dict[str, Any] = {"notes": []}
    until = time.monotonic() + COUNTERS_S
    for kind, kernel in KERNELS.items():
        ended = run_limited([tool, "--csv", "--clock-control", "none", "--kernel-name", f"regex:{kernel}",
                             "--launch-skip", "1", "--launch-count", "1", "--metrics", ",".join(METRICS),
                             sys.executable, str(CHILD), kind], max(until - time.monotonic(), 0.1))
        values = read_counters(ended.output)
        if values:
            found[kind] = values
        else:
            last = next((line for line in reversed(ended.output.splitlines()) if line.startswith("==")), "no output")
            why = "did not end in time" if ended.code is None else f"exit {ended.code}: {last.strip('= ')[:120]}"
            found["notes"].append(f"{kind}: no counters ({why})")
    return found


def read_counters(output: str) -> dict[str, str]:
    """From what ncu --csv prints: a header that begins with "ID", and a line for each metric."""
    lines = output.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return {}
    rows = csv.DictReader(lines[start:])
    return {METRICS[row["Metric Name"]]: f"{row['Metric Value']} {row['Metric Unit']}".strip()
            for row in rows if row.get("Metric Name") in METRICS}
