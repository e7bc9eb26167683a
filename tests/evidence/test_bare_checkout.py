"""The committed simulation of a machine that nothing can be installed on: without a fault, and of what is here now."""

from __future__ import annotations

import importlib
import json
from types import ModuleType

import pytest
from evidence.gpu_stages import ESTIMATES


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return importlib.import_module("bare_checkout")


@pytest.fixture
def report(script: ModuleType) -> dict:
    return json.loads((script.OUT / f"{script.NAME}.json").read_text())


def test_the_simulation_found_nothing_wrong_and_the_page_shows_it(script: ModuleType, report: dict) -> None:
    assert script.problems(report) == []
    assert (script.OUT / f"{script.NAME}.md").read_text() == script.page(report)


def test_every_stage_ran_in_exactly_the_versions_of_such_a_machine(script: ModuleType, report: dict) -> None:
    assert report["run"]["stages"] == dict.fromkeys(ESTIMATES, "done")
    for name, version in script.INSTALLED.items():
        assert report["versions"][name].partition("+")[0] == version
    assert report["kernels"]["triton"] == script.INSTALLED["triton"]
    assert {"onnx_graphsurgeon", "polygraphy", "gguf", "tensorrt", "pydantic"} <= set(report["absent"])
    assert any("C++" in way for way in report["run"]["shipping"]), "the C++ harness was compiled and run"


def test_what_ended_before_a_kill_was_kept_and_the_rest_resumed(script: ModuleType, report: dict) -> None:
    assert [len(one["kept"]) for one in report["kills"]] == list(script.KILLED_IN)
    assert all(one["complete_after_resume"] for one in report["kills"])


def test_stages_are_of_the_scripts_that_are_here_now(script: ModuleType, report: dict) -> None:
    assert report["sources"] == script.sources_digest(), "run scripts/bare_checkout.py, commit its result"


def test_kernels_are_of_the_source_that_is_compiled_now(report: dict) -> None:
    """The text of the kernels and what is compiled in: unlike Triton's own key it is the same in every Triton."""
    pytest.importorskip("triton")
    cases = importlib.import_module("ptx_cases")
    from ptx.cases import RUNS

    runs = report["kernels"]["runs"]
    assert list(runs) == list(RUNS)
    assert len(runs) >= 20
    stale = [name for name, run in RUNS.items() if runs[name]["code"] != cases.code_of(run)]
    assert not stale, "run scripts/bare_checkout.py, commit its result"


@pytest.mark.parametrize(("change", "said"), [
    (lambda r: r["run"]["stages"].update(smoke="failed"), "stage smoke: failed"),
    (lambda r: r["versions"].update(triton="3.9.0"), "triton is 3.9.0, wanted 3.6.0"),
    (lambda r: next(iter(r["kernels"]["runs"].values())).update(ok=False, fault="Fault: a race"), "Fault: a race"),
    (lambda r: r["kills"][0].update(complete_after_resume=False), "the rest was not run"),
    (lambda r: r["started"].update(exit=1), "started without a GPU"),
    (lambda r: r["absent"].remove("onnx"), "onnx is installed")])
def test_every_fault_is_a_problem(script: ModuleType, report: dict, change, said: str) -> None:
    change(report)
    (problem,) = script.problems(report)
    assert said in problem
