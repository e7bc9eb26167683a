"""The committed random runs (scripts/ptx_sweep.py): all right, and of the kernels that are compiled now."""

from __future__ import annotations

import importlib.util
import json
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.kernels
ROOT = Path(__file__).resolve().parent.parent.parent
REPORT = ROOT / "docs" / "benchmarks" / "ptx_sweep.json"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ptx_sweep", ROOT / "scripts" / "ptx_sweep.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_hundred_runs_are_right_and_the_page_shows_them() -> None:
    report = json.loads(REPORT.read_text())
    assert len(report["runs"]) >= 200
    assert not [run["number"] for run in report["runs"] if not run["ok"]]
    assert {run["capability"] for run in report["runs"]} == {80, 89, 90, 120}
    assert REPORT.with_suffix(".md").read_text() == script().page(report)


def test_the_runs_are_of_the_kernels_that_are_compiled_now() -> None:
    report = json.loads(REPORT.read_text())
    if report["triton"] != version("triton"):
        pytest.skip(f"the runs are of Triton {report['triton']}")
    sweep = script()
    assert not [run["number"] for run in report["runs"] if run["code"] != sweep.code_of(run["number"])], \
        "run scripts/ptx_sweep.py, commit its result"
