"""Timing of whole commands: nobody pays for compiling modules, and a result that cannot be believed is refused."""

from __future__ import annotations

import copy
import json
import sys

import pytest
from evidence.whole_process import FIGURES, Program, compare, imported_from_source, run_once, unbelievable

ADD = "import helper; print(helper.VALUE)"


def program(folder, words=ADD):
    return Program(lambda number: [sys.executable, "-c", words], {"PYTHONPATH": str(folder)}, source=folder)


@pytest.fixture
def helper(tmp_path, monkeypatch):
    """A folder with a module, and a compiler that compiles that folder alone: an environment takes a minute."""
    monkeypatch.setattr("evidence.whole_process.compile_bytecode",
                        lambda python, source: __import__("compileall").compile_dir(source, quiet=2))
    (tmp_path / "helper.py").write_text("VALUE = 3\n")
    return tmp_path


def test_a_module_without_bytecode_is_told(helper):
    found = imported_from_source([sys.executable, "-c", ADD], {"PYTHONPATH": str(helper)})
    assert str(helper / "helper.py") in found
    assert imported_from_source([sys.executable, "-c", ADD], {"PYTHONPATH": str(helper)}) == []


def test_the_variable_that_forbids_bytecode_does_not_reach_the_programs(helper, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    run_once([sys.executable, "-c", ADD], {"PYTHONPATH": str(helper)})
    assert list((helper / "__pycache__").glob("helper.*.pyc"))


def test_a_program_that_compiles_a_module_at_each_start_is_refused(helper):
    words = "import pathlib, helper; [p.unlink() for p in pathlib.Path(helper.__file__).parent.rglob('*.pyc')]"
    with pytest.raises(RuntimeError, match=r"compiles 1 modules at each start: .*helper\.py"):
        compare({"forgetful": program(helper, words)}, 1, peers=["forgetful"], packages=[], tell=lambda line: None)


def test_a_program_that_fails_is_told_with_its_status(helper):
    with pytest.raises(RuntimeError, match="status 3"):
        run_once([sys.executable, "-c", "raise SystemExit(3)"], {})


def test_the_memory_of_the_process_that_measures_is_not_counted():
    held = bytearray(b"1" * 400_000_000)
    assert run_once([sys.executable, "-c", "pass"], {}).peak_mb < 100, f"{len(held)} bytes are held here"


def test_programs_are_compared_with_the_best_peer_figure_by_figure(helper):
    busy = program(helper, "import helper; sum(range(10_000_000)); data = b'1' * 300_000_000")
    result = compare({"ours": busy, "peer": program(helper), "other": busy}, 5, peers=["peer", "other"],
                     packages=["numpy"], tell=lambda line: None)
    result["load_before"] = 0.0  # other tests may be running
    assert unbelievable(result) == []
    assert set(result["ratios"]) == {"ours"}
    assert all(result["ratios"]["ours"][figure] > 1 for figure in FIGURES)
    assert result["ratios"]["ours"]["peak_mb"] > 10, "300 MB against a bare interpreter of some 10"
    assert json.loads(json.dumps(result)) == result

    for field in ("bytecode", "load_before", "versions", "runs"):
        lacking = {name: value for name, value in result.items() if name != field}
        assert unbelievable(lacking) == [f"lacks {field}"]
    busy_machine = {**result, "load_before": 7.5}
    assert unbelievable(busy_machine) == ["the machine was busy before the first run"]
    once = copy.deepcopy(result)
    once["runs"] = 1
    assert "fewer than five runs" in unbelievable(once)
    del result["costs"]["ours"][0]["cpu_s"]
    assert unbelievable(result) == ["ours: a run lacks cpu_s"]
