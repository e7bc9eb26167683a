"""The committed measurement of approximate attention: of today's settings, and it shows what is demanded."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

import gqa_export
from gqa_export.long_attention_op import DEFAULTS

ROOT = Path(gqa_export.__file__).parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts" / "benchmark_long_attention.py"
    spec = importlib.util.spec_from_file_location("benchmark_long_attention", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    path = ROOT / "scripts" / "long_context_smollm2.py"
    spec = importlib.util.spec_from_file_location("long_context_smollm2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks for its module there
    spec.loader.exec_module(module)
    return module


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
