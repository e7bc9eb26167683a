"""Are the lower bounds in pyproject.toml true? An environment at the bounds of transformers and onnxruntime answers.

    python scripts/lower_bounds.py        # some minutes; writes docs/benchmarks/lower_bounds.json

Everything else stays as in constraints.txt, PyTorch too: its bound is not tested here. The selection is what an older
version breaks first: whole models traced through transformers' attention and mask interfaces, exported to the three
targets that ONNX Runtime runs, with growing and static caches, and compared with PyTorch (grouped heads, windows,
sinks, softcap, experts); the sessions; the attention interface itself. The environment is made in build/lower_bounds
and may be deleted afterwards. Standard library only.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "docs" / "benchmarks" / "lower_bounds.json"
BOUNDED = ("transformers", "onnxruntime")
LOOSE = ("onnxruntime-genai",)
"""whose version in constraints.txt asks for a newer onnxruntime"""
SELECTION = (
    ("tests/exporting/test_export.py", "-k", "llama-ort or llama_mqa or mistral or mixtral or gemma3 or gpt_oss"),
    ("tests/runtime/test_sessions.py", "tests/trace/test_attention.py"),
)


def bounds() -> dict[str, str]:
    """The lower bounds that pyproject.toml has: {"transformers": "5.20", ...}."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return {name: re.search(rf'"{name}>=([0-9.]+)', text)[1] for name in BOUNDED}


def constraints(lowest: dict[str, str]) -> str:
    """constraints.txt with the bounded packages at their bounds."""
    lines = []
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name = line.partition("==")[0].lower()
        if name not in LOOSE:
            lines.append(f"{name}=={lowest[name]}" if name in lowest else line)
    return "\n".join(lines) + "\n"


def make_environment(folder: Path, lowest: dict[str, str]) -> Path:
    """Its Python. As scripts/test.sh makes one, with other constraints."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "constraints.txt").write_text(constraints(lowest))
    environment = {**os.environ, "GQA_EXPORT_VENV": str(folder / "venv"),
                   "GQA_EXPORT_CONSTRAINTS": str(folder / "constraints.txt")}
    subprocess.run(["bash", "-ec", "source scripts/environment.sh; setup_environment ort,test"], cwd=ROOT, check=True,
                   env=environment)
    return folder / "venv" / "bin" / "python"


def installed(python: Path) -> dict[str, str]:
    """The versions that the environment has of what is bounded, and of what else decides."""
    names = (*BOUNDED, "torch", "onnx", "onnxscript", "onnxruntime-genai")
    script = f"from importlib.metadata import version\nprint(*map(version, {names}))"
    said = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True).stdout
    return dict(zip(names, said.split()))


def run(python: Path, folder: Path) -> dict[str, int]:
    """How the selected tests ended."""
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for number, selected in enumerate(SELECTION):
        report = folder / f"report-{number}.xml"
        subprocess.run([python, "-m", "pytest", "-q", f"--junitxml={report}", *selected], cwd=ROOT, env=environment)
        suite = ElementTree.parse(report).getroot().find("testsuite")
        for name in counts:
            counts[name] += int(suite.get(name))
    return counts


def main() -> int:
    """Install, run, write down."""
    began, folder, lowest = time.perf_counter(), ROOT / "build" / "lower_bounds", bounds()
    python = make_environment(folder, lowest)
    ready = time.perf_counter()
    counts = run(python, folder)
    passed = counts["tests"] > 0 and not counts["failures"] and not counts["errors"]
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU threads, Python {platform.python_version()}",
        "bounds": lowest, "installed": installed(python), "selection": [" ".join(part) for part in SELECTION],
        **counts, "passed": passed, "install_s": round(ready - began), "tests_s": round(time.perf_counter() - ready),
    }
    OUTPUT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
