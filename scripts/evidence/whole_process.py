"""What a whole command costs, measured fairly beside other programs: wall time, CPU time, peak memory.

A program whose modules Python has to compile at each start looks slow and is not. So the bytecode of every environment
is compiled first, children do not inherit the variables that forbid bytecode, and a warm-up run of every command must
import nothing from source. Runs go in turn, so that a slow minute of the machine falls on all alike.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gqa_export.environment.machine import cores, processor

AGAINST_BYTECODE = ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "PYTHONOPTIMIZE")
"""variables under which a child would compile its modules at each start, or look for bytecode somewhere else"""
FROM_SOURCE = re.compile(r"^# code object from '?(?P<file>.*\.py)'?$", re.MULTILINE)
"""what Python prints with PYTHONVERBOSE for a module that it had to compile"""
STARTER = """
import json, os, sys, time
quiet = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)]
began = time.perf_counter()
_, status, used = os.wait4(os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=quiet), 0)
print(json.dumps([status, time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss]))
"""
"""starts a command and measures it: Linux counts the memory of the starting process as the command's, so a small
process must start it"""
REQUIRED = ("date", "machine", "cores", "load_before", "python", "versions", "runs", "bytecode", "costs", "ratios")
"""fields without which a comparison of commands cannot be believed; see `unbelievable`"""
FIGURES = ("wall_s", "cpu_s", "peak_mb")


@dataclass(frozen=True)
class Cost:
    """One run: wall and CPU seconds of the process and its children, its largest resident memory in megabytes."""

    wall_s: float
    cpu_s: float
    peak_mb: float


@dataclass(frozen=True)
class Program:
    """A command to time. `command` makes the words for run `number` (each run writes somewhere else); `variables` are
    set for the child; `python` is its interpreter, whose packages are compiled first; `source` is a folder of modules
    outside of that interpreter's packages."""

    command: Callable[[int], Sequence[str]]
    variables: Mapping[str, str]
    python: str = sys.executable
    source: Path | None = None


def child_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's variables with `variables`, without those that keep a child from its bytecode."""
    return {**{name: value for name, value in os.environ.items() if name not in AGAINST_BYTECODE}, **variables}


def compile_bytecode(python: str, source: Path | None = None) -> None:
    """Compile every module of an interpreter's packages, and of `source`. Files that are no valid Python (templates
    that some packages carry) are left out by compileall itself."""
    where = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True,
                           capture_output=True, text=True, env=child_environment({})).stdout.strip()
    subprocess.run([python, "-m", "compileall", "-q", where, *([str(source)] if source else [])], check=False,
                   stdout=subprocess.DEVNULL, env=child_environment({}))


def imported_from_source(command: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """Files that Python compiled while this command ran; RuntimeError if the command fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False,
                          env=child_environment({**variables, "PYTHONVERBOSE": "1"}))
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {' '.join(command)}\n{done.stderr[-2000:]}")
    return FROM_SOURCE.findall(done.stderr)


def run_once(command: Sequence[str], variables: Mapping[str, str]) -> Cost:
    """Run a command in a new process and wait; RuntimeError if it fails."""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", STARTER, *command], capture_output=True, text=True,
                          check=False, env=child_environment(variables))
    if done.returncode:
        raise RuntimeError(f"the command was not started: {' '.join(command)}\n{done.stderr[-2000:]}")
    status, wall, cpu, peak = json.loads(done.stdout)
    if status:
        raise RuntimeError(f"status {os.waitstatus_to_exitcode(status)}: {' '.join(command)}")
    return Cost(wall, cpu, peak / 1e3)


def compare(programs: Mapping[str, Program], runs: int, *, peers: Sequence[str], packages: Sequence[str],
            tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Time the programs in turn, `runs` times after a warm-up; the fields of REQUIRED.

    The ratios are medians divided by the median of the fastest peer, for each figure by itself. RuntimeError where a
    command fails, or still compiles modules after its environment was compiled and it has run once.
    """
    load = os.getloadavg()[0]
    for python, source in {(program.python, program.source) for program in programs.values()}:
        compile_bytecode(python, source)
    for name, program in programs.items():
        run_once(program.command(-2), program.variables)
        if compiled := imported_from_source(program.command(-1), program.variables):
            raise RuntimeError(f"{name} compiles {len(compiled)} modules at each start: {', '.join(compiled[:5])}")
    costs: dict[str, list[Cost]] = {name: [] for name in programs}
    for number in range(runs):
        for name, program in programs.items():
            costs[name].append(run_once(program.command(number), program.variables))
            tell(f"{name}: {costs[name][-1]}")
    medians = {name: {figure: statistics.median(getattr(cost, figure) for cost in rows) for figure in FIGURES}
               for name, rows in costs.items()}
    best = {figure: min(medians[peer][figure] for peer in peers) for figure in FIGURES}
    return {"date": date.today().isoformat(), "machine": f"{processor()} ({platform.machine()})", "cores": cores(),
            "load_before": load,
            "python": platform.python_version(), "versions": {name: version(name) for name in packages}, "runs": runs,
            "bytecode": "compiled; after one run no command imported a module from source",
            "costs": {name: [asdict(cost) for cost in rows] for name, rows in costs.items()},
            "ratios": {name: {figure: row[figure] / best[figure] for figure in FIGURES}
                       for name, row in medians.items() if name not in peers}}


def unbelievable(result: Mapping[str, Any]) -> list[str]:
    """What a result file lacks to be believed; empty if nothing."""
    missing = [field for field in REQUIRED if field not in result]
    if missing:
        return [f"lacks {field}" for field in missing]
    faults = [f"{name}: {len(rows)} runs, {result['runs']} wanted" for name, rows in result["costs"].items()
              if len(rows) != result["runs"]]
    faults += [f"{name}: a run lacks {figure}" for name, rows in result["costs"].items() for figure in FIGURES
               if any(figure not in row for row in rows)]
    faults += ["fewer than five runs"] if result["runs"] < 5 else []
    faults += ["the machine was busy before the first run"] if result["load_before"] > result["cores"] / 2 else []
    return faults


def unbelievable_rows(report: Mapping[str, Any], required: Sequence[str], figures: Sequence[str], key: str,
                      wanted: Collection[Any]) -> list[str]:
    """What a result of one row each of `wanted`, named by `key`, lacks to be believed; empty if nothing."""
    missing = [f"lacks {field}" for field in required if field not in report]
    if missing:
        return missing
    faults = [f"{row.get(key)}: lacks {figure}" for row in report["rows"] for figure in figures if figure not in row]
    if sorted(str(row.get(key)) for row in report["rows"]) != sorted(map(str, wanted)):
        faults.append(f"not all {key}s were run")
    return faults + (["the machine was busy before"] if report["load_before"] > report["cores"] / 2 else [])


def median(rows: Sequence[Mapping[str, float]], figure: str) -> str:
    """A figure of a program's runs for a table: the median, then the least and the most."""
    values = sorted(row[figure] for row in rows)
    return f"{statistics.median(values):.1f} ({values[0]:.1f} - {values[-1]:.1f})"
