"""The committed measurement of approximate attention: of today's settings, and it shows what is demanded."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from gqa_models import write_tiny

import gqa_export
from gqa_export.exporting.long_plan import LongOptions
from gqa_export.long_attention_op import DEFAULTS

ROOT = Path(gqa_export.__file__).parent.parent


def loaded(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a dataclass looks for its module there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return loaded("benchmark_long_attention")


@pytest.fixture(scope="module")
def result() -> dict:
    return json.loads((ROOT / "docs" / "benchmarks" / "long_attention.json").read_text())


def test_the_result_is_of_the_default_settings_and_its_page_is_made_from_it(script: ModuleType, result: dict) -> None:
    assert result["settings"] == {name: DEFAULTS[name].attributes() for name in ("hyper", "tiles")}
    assert (ROOT / "docs" / "benchmarks" / "long_attention.md").read_text() == script.table(result)
    assert (ROOT / "docs" / "benchmarks" / "long_attention.svg").read_text() == script.picture(result)


@pytest.mark.parametrize("method", ["hyper", "tiles"])
def test_it_is_faster_than_exact_attention_nearly_linear_and_small(script: ModuleType, result: dict,
                                                                     method: str) -> None:
    exact, ours = result["seconds"]["exact"], result["seconds"][method]
    for length, times in script.DEMANDED[method].items():
        assert exact[str(length)] >= times * ours[str(length)], length
    assert ours["32768"] <= script.MOST_PER_DOUBLING * ours["16384"]
    assert result["peak_gb"][method] < script.LARGEST_GB


@pytest.mark.parametrize("name", ["exact", "hyper", "tiles"])
def test_the_measurement_runs(script: ModuleType, name: str) -> None:
    found = script.measure(name, 1100, 1)
    assert found["seconds"] > 0


@pytest.fixture(scope="module")
def smollm2() -> ModuleType:
    return loaded("long_context_smollm2")


def test_what_was_measured_on_smollm2_is_of_these_rows_and_meets_what_is_demanded(smollm2: ModuleType) -> None:
    place = ROOT / "docs" / "benchmarks" / "long_context_smollm2.json"
    results = json.loads(place.read_text())
    rows = {row.name: row for row in smollm2.ROWS}
    assert results
    assert set(results) <= set(rows)
    for name, found in results.items():
        assert found["setting"] == rows[name].setting.attributes()
        assert found["tokens"] == rows[name].tokens
        assert smollm2.broken(rows[name], found) == []
    assert place.with_suffix(".md").read_text() == smollm2.page(results)
    assert place.with_suffix(".svg").read_text() == smollm2.picture(results)


@pytest.fixture(scope="module")
def prefill() -> ModuleType:
    return loaded("benchmark_long_prefill")


def test_a_whole_prompt_is_read_by_each_graph_in_turn(prefill: ModuleType, tmp_path: Path) -> None:
    """On a tiny model, whose times tell nothing."""
    how = LongOptions("tiles", leaf=64, heavy=64, samples=16, anchors=3, from_tokens=128)
    made = prefill.bundles(str(write_tiny("llama", tmp_path / "llama")), tmp_path, 300, how, ("last:1",))
    seconds = prefill.measure(made, 300, 2)
    assert {name: len(times) for name, times in seconds.items()} == {"exact": 2, "last:1": 2}
    result = {"tokens": 300, "seconds": {"exact": [2.0, 1.0], "last:1": [0.5, 3.0], "all": [1.0, 1.5]},
              "setting": DEFAULTS["tiles"].attributes(), "from_tokens": 128, "versions": {"onnx": "1"}}
    assert "| last:1 | 0.5 | 2.00 |" in prefill.table(result)
    assert prefill.unmet(result) == ["all: 1.0 s, exact 1.0 s"]


@pytest.mark.parametrize("place", sorted((ROOT / "docs" / "benchmarks").glob("long_prefill.json")), ids=str)
def test_the_committed_prompt_is_of_the_default_setting_and_read_faster(prefill: ModuleType, place: Path) -> None:
    result = json.loads(place.read_text())
    assert result["setting"] == DEFAULTS["tiles"].attributes()
    assert (result["tokens"], set(result["seconds"])) == (prefill.TOKENS, {prefill.EXACT, *prefill.CHOICES})
    assert prefill.unmet(result) == []
    assert place.with_suffix(".md").read_text() == prefill.table(result)
