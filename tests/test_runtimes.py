"""The committed result of scripts/runtimes.py is of the graphs that this code makes, and old releases run them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("runtimes", ROOT / "scripts" / "runtimes.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runtimes = _script()
REPORT = json.loads((runtimes.OUT / f"{runtimes.NAME}.json").read_text(encoding="utf-8"))


@pytest.mark.whole_model
def test_the_result_is_of_the_graphs_that_this_code_makes() -> None:
    facts = ("opset", "ir_version", "structure")
    found = {row["sample"]: {name: row[name] for name in facts} for row in REPORT["rows"]}
    assert found == runtimes.structures(), "run scripts/runtimes.py again and commit its result"


def test_the_result_is_of_these_releases_and_the_page_shows_it() -> None:
    assert REPORT["versions"] == [*runtimes.OLD, runtimes.newest()], "run scripts/runtimes.py again"
    assert runtimes.markdown(REPORT) == (runtimes.OUT / f"{runtimes.NAME}.md").read_text(encoding="utf-8")
    assert REPORT["date"]
    assert REPORT["machine"]


def test_every_release_runs_every_ort_and_portable_graph_but_for_what_it_has_no_input_for() -> None:
    assert REPORT["passed"]
    for row in REPORT["rows"]:
        assert runtimes.sound(row), row["sample"]
        if row["target"] != "onnx":
            assert row["opset"] <= min(runtimes.OPSETS.values())
            refused = [version for version, answer in row["runtimes"].items() if answer["refusal"]]
            assert refused == ([] if (row["model"], row["target"]) not in runtimes.KNOWN else list(runtimes.OLD))
    assert {row["opset"] for row in REPORT["rows"] if row["target"] == "portable"} <= {18, 20}


@pytest.mark.parametrize("change", [
    {"refusal": "", "difference": 0.01}, {"refusal": "", "difference": float("inf")}, {"refusal": "no memory"}])
def test_a_release_that_differs_or_refuses_for_another_reason_is_not_a_pass(change: dict[str, Any]) -> None:
    for row in REPORT["rows"]:
        assert not runtimes.sound({**row, "runtimes": {**row["runtimes"], "1.20.1": change}})


def test_the_figures_of_the_readme_are_those_of_the_result() -> None:
    minor = [".".join(version.split(".")[:2]) for version in REPORT["versions"]]
    assert f"ONNX Runtime {minor[0]}, {minor[1]} and {minor[2]} run the `ort` and `portable` bundles" in README
    worst = max(answer["difference"] for row in REPORT["rows"] if row["target"] != "onnx"
                for answer in row["runtimes"].values() if not answer["refusal"])
    assert worst <= 1e-5
    assert "their logits agree within 1e-5" in README
