"""A simulation of a GPU machine that nothing can be installed on: `scripts/gpu_check.py` from a bare checkout.

    python scripts/bare_checkout.py [--python python3.12] [--keep FOLDER]    -> docs/benchmarks/bare_checkout.json, .md

Makes an environment with exactly what such a machine has (needs the network and 5 GB of disk the first time; --keep
reuses it), copies the tracked files and nothing else, and runs there, in processes of that environment:

  imports    what the machine lacks is not there; the check starts, and says that there is no GPU
  kernels    the runs of tests/ptx: this Triton's code for every kernel, on the PTX interpreter, against fp64
  files      compiled files for an engine, written by that Triton
  stages     every stage of gpu_check, with a stub in the GPU's place: what needs a GPU is not shown
  kills      the same, told to end in the middle of several stages, and resumed
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "benchmarks"
NAME = "bare_checkout"
PYTHON = "3.12"
INSTALLED = {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0", "numpy": "2.5.2"}
"""what the machine has, by exact version; their own dependencies come along"""
ABSENT = ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "onnx_graphsurgeon", "polygraphy", "gguf", "pydantic",
          "platformdirs", "psutil", "accelerate", "tensorrt", "tensorrt_rtx", "flash_attn", "flashinfer", "pytest")
"""what it lacks, or what is not to be relied on there"""
BROUGHT = ("pydantic", "pydantic_core")
"""dependencies of dependencies that newer releases bring and the machine does not have: removed"""
SOURCES = ("scripts/gpu_check.py", "scripts/evidence/checkout.py", "scripts/evidence/gpu_*.py",
           "scripts/evidence/shipping_path.py", "scripts/evidence/staged_run.py",
           "scripts/evidence/stub_gpu.py", "plugins/grouped_attention/gpu_*.py",
           "plugins/grouped_attention/driver_ctypes.py")
"""the files whose change makes the stages' result old; that of the kernels is old when their code is (ptx_cases)"""
STAGES = """
import os, signal, sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, "scripts")
import gpu_check
from evidence import stub_gpu
from evidence.checkout import alias_packages
library, out, mode, place = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
alias_packages()
import evidence.gpu_model, evidence.shipping_path
if mode != "whole":
    evidence.shipping_path.build_harness = lambda _: (None, "the harness was not run")
with stub_gpu.in_place_of_a_gpu(gpu_check, library, cases=24, pause_s=0.01, compiled=mode == "whole"):
    if mode == "killed":
        made = gpu_check.gpu_stages.all_stages
        def with_a_kill(options, device):
            def kill(found):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
            return [replace(stage, run=kill) if n == place else stage for n, stage in enumerate(made(options, device))]
        gpu_check.gpu_stages.all_stages = with_a_kill
    sys.exit(gpu_check.main(["--out", out, "--resume", "--no-sanitizer", "--jobs", "2"]))
"""
KILLED_IN = (0, 2, 5)
"""numbers of the stages in whose middle the process is told to end"""


def sources_digest() -> str:
    """Of the program and the files that the stages run."""
    digest = hashlib.sha256(STAGES.encode())
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def make_environment(folder: Path, python: str) -> Path:
    """The Python of the environment; made unless it is there."""
    found = folder / "bin" / "python"
    if not found.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(found), "-m", "pip", "install", "-q",
                        *(f"{name}=={version}" for name, version in INSTALLED.items())], check=True)
        subprocess.run([str(found), "-m", "pip", "uninstall", "-q", "-y", *BROUGHT], check=True)
    return found


class Machine:
    """The environment and the copy of the tracked files."""

    def __init__(self, python: Path, checkout: Path) -> None:
        self.python, self.checkout = python, checkout

    def run(self, *words: str, libraries: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A command of that machine's Python, in the checkout."""
        kept = {name: value for name, value in os.environ.items()
                if name not in ("PYTHONPATH", "TRITON_INTERPRET", "VIRTUAL_ENV")}
        extra = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if libraries is not None:
            extra["LD_LIBRARY_PATH"] = str(libraries)
        return subprocess.run([str(self.python), *words], cwd=self.checkout, env={**kept, **extra}, text=True,
                              capture_output=True)


def needed(done: subprocess.CompletedProcess[str], *codes: int) -> str:
    """Its output. Raises RuntimeError with what it said unless it ended with one of the codes."""
    if done.returncode not in (codes or (0,)):
        raise RuntimeError(f"ended with {done.returncode}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def versions_of(machine: Machine) -> dict[str, str]:
    """What the environment has."""
    names = list(INSTALLED)
    program = ("import json, platform; from importlib.metadata import version; "
               f"print(json.dumps({{'python': platform.python_version(), **{{n: version(n) for n in {names!r}}}}}))")
    return json.loads(needed(machine.run("-c", program)))


def absent_from(machine: Machine) -> list[str]:
    """Those of ABSENT that the environment really lacks."""
    program = ("import json; from importlib.util import find_spec; "
               f"print(json.dumps([n for n in {list(ABSENT)!r} if find_spec(n) is None]))")
    return json.loads(needed(machine.run("-c", program)))


def without_a_gpu(machine: Machine) -> dict[str, Any]:
    """The check itself, as it is started there, on a machine without a GPU: it must get as far as saying so."""
    done = machine.run("scripts/gpu_check.py", "--budget", "540", "--out", "out/results")
    return {"exit": done.returncode, "said": done.stderr.strip().splitlines()[-1]}


def kernels(machine: Machine, before: dict[str, Any]) -> dict[str, Any]:
    """The runs of tests/ptx; those that were made before of the same code are kept."""
    path = machine.checkout / "ptx.json"
    path.write_text(json.dumps(before))
    needed(machine.run("scripts/ptx_cases.py", "--out", str(path)), 0, 1)
    return json.loads(path.read_text())


def stages(machine: Machine, library: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what became of every stage, what each kill left and whether the rest was run after it)."""
    def start(out: str, mode: str, place: int = 0) -> subprocess.CompletedProcess[str]:
        return machine.run("-c", STAGES, str(library), out, mode, str(place), libraries=library.parent)

    def read(out: str) -> dict[str, Any]:
        path = machine.checkout / out / "gpu_check.json"
        return json.loads(path.read_text()) if path.is_file() else {"stages": {}}

    told = needed(start("out/whole", "whole"))
    whole = read("out/whole")
    found = {"stages": {name: fact["status"] for name, fact in whole["stages"].items()},
             "shipping": {row["kernel"]: row["passed"] for row in whole["shipping"]},
             "shipping_note": whole["shipping_note"], "peers": whole["decode"][0]["peers"],
             "model": [row["passed"] for row in whole["model"]], "counters": whole["counters"]["notes"],
             "table_is_last": told.splitlines()[-1].startswith("written: ")}
    kills = []
    for place in KILLED_IN:
        out = f"out/killed-{place}"
        done = start(out, "killed", place)
        needed(done, 143)
        kept = [name for name, fact in read(out)["stages"].items() if fact["status"] == "done"]
        needed(start(out, "resumed"))
        resumed = [name for name, fact in read(out)["stages"].items() if fact["status"] == "done"]
        kills.append({"in_stage": list(found["stages"])[place], "exit": done.returncode, "kept": kept,
                      "complete_after_resume": sorted(resumed) == sorted(found["stages"])})
    return found, kills


def simulate(python: str, keep: Path | None, before: dict[str, Any]) -> dict[str, Any]:
    """Everything, in folders of its own."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from evidence.stub_gpu import build_stub_driver

    with TemporaryDirectory(prefix="gqa-bare-") as name:
        scratch = Path(name)
        checkout = scratch / "checkout"
        tracked = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                                 check=True, capture_output=True, text=True).stdout
        for path in filter(None, tracked.split("\0")):
            (checkout / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, checkout / path)
        size = sum(path.stat().st_size for path in checkout.rglob("*") if path.is_file())
        machine = Machine(make_environment(keep or scratch / "environment", python), checkout)
        results: dict[str, Any] = {
            "date": date.today().isoformat(), "versions": versions_of(machine), "absent": absent_from(machine),
            "checkout_mib": round(size / 2**20, 1), "sources": sources_digest()}
        results["started"] = without_a_gpu(machine)
        results["files"] = needed(machine.run("scripts/gpu_check.py", "--write-kernels", "out/kernels", "--jobs", "1")
                                  ).split(":")[0].strip()
        library = build_stub_driver(scratch)
        results["run"], results["kills"] = stages(machine, library)
        results["kernels"] = kernels(machine, before.get("kernels", {}))
    return results


def problems(results: dict[str, Any]) -> list[str]:
    """What is not as it should be, one line each."""
    found = [f"{name} is {results['versions'].get(name)}, wanted {wanted}"
             for name, wanted in {"python": PYTHON, **INSTALLED}.items()
             if not results["versions"].get(name, "").startswith(wanted)]
    found += [f"{name} is installed" for name in ABSENT if name not in results["absent"]]
    if results["started"]["exit"] != 3 or "sees no CUDA GPU" not in results["started"]["said"]:
        found.append(f"started without a GPU it ended with {results['started']}")
    run = results["run"]
    found += [f"stage {name}: {status}" for name, status in run["stages"].items() if status != "done"]
    found += [f"{way}: wrong" for way, passed in run["shipping"].items() if not passed]
    if not run["table_is_last"] or not all(run["model"]):
        found.append("the table is not last, or the model is wrong")
    found += [f"killed in {one['in_stage']}, the rest was not run" for one in results["kills"]
              if not one["complete_after_resume"]]
    return found + [f"{name}: {one.get('fault', one.get('error'))}" for name, one in results["kernels"]["runs"].items()
                    if not one["ok"]]


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    versions = results["versions"]
    wrong, run, runs = problems(results), results["run"], results["kernels"]["runs"]
    listed = ", ".join(f"{name} {versions[name]}" for name in ("python", *INSTALLED))
    worst = max((one["error"] / one["allowed"] for one in runs.values() if "error" in one), default=0.0)
    lines = [
        "# From a bare checkout, simulated", "",
        f"{results['date']}, {listed}, x86_64, no GPU. Made by `scripts/bare_checkout.py`.", "",
        f"An environment with these versions and what they need, without {', '.join(results['absent'])}; "
        f"the tracked files, {results['checkout_mib']} MiB, not installed. A stub stands in the GPU's place: "
        "stages, files, launches, kills and the C++ harness are real, kernels, clock and graph are not, and no figure "
        "means anything. That a kernel is right or fast on a GPU is not shown here.", "",
        "| | |", "|---|---|",
        f"| started without a GPU | exit {results['started']['exit']}: {results['started']['said']} |",
        f"| compiled files for an engine | {results['files']} |",
        *(f"| stage {name} | {status} |" for name, status in run["stages"].items()),
        f"| shipping path | {', '.join(run['shipping'])}: "
        f"{sum(run['shipping'].values())} of {len(run['shipping'])} the same bits |",
        f"| peers | {'; '.join(f'{name} {why}' for name, why in run['peers'].items() if isinstance(why, str))} |",
        f"| counters | {'; '.join(run['counters'])} |",
        f"| told to end in the middle of {', '.join(one['in_stage'] for one in results['kills'])} | "
        f"{', '.join(str(len(one['kept'])) for one in results['kills'])} stages kept, the rest run by `--resume` |", "",
        f"## The compiled kernels on Triton {results['kernels']['triton']}", "",
        f"The runs of `tests/ptx/test_kernels.py`, with the code that this Triton compiles, on the PTX interpreter: "
        f"{sum(one['ok'] for one in runs.values())} of {len(runs)} right, the largest share of the allowed error "
        f"{worst:.0%}.", "", "| run | error | allowed |", "|---|---|---|",
        *(f"| {name} | {one['error']:.3g} | {one['allowed']:.3g} |" if "error" in one else
          f"| {name} | {one['fault']} | |" for name, one in runs.items())]
    return "\n".join([*lines, *(["", *(f"- wrong: {line}" for line in wrong)] if wrong else [])]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=f"python{PYTHON}", help="a Python of that version")
    parser.add_argument("--keep", type=Path, help="folder of the environment, kept and used again")
    options = parser.parse_args(arguments)
    path = OUT / f"{NAME}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    results = simulate(options.python, options.keep, before)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (OUT / f"{NAME}.md").write_text(page(results), encoding="utf-8")
    for line in problems(results):
        print(f"WRONG  {line}")
    return int(bool(problems(results)))


if __name__ == "__main__":
    sys.exit(main())
