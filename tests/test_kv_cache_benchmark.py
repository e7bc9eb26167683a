"""The committed measurement of quantized caches is of this version of its script's facts, and shows what is claimed."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import gqa_export

ROOT = Path(gqa_export.__file__).parent.parent
DATA = json.loads((ROOT / "docs" / "benchmarks" / "kv_cache.json").read_text())
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "benchmark_kv_cache.py"))


def test_the_measurement_is_of_this_script():
    assert DATA["heads"] == [SCRIPT["HEADS"], SCRIPT["KV_HEADS"], SCRIPT["SIZE"]]
    assert list(DATA["step_cpu_ms"]) == [str(length) for length in SCRIPT["LENGTHS"]]
    assert all(set(times) == set(SCRIPT["ELEMENTS"]) for times in DATA["step_cpu_ms"].values())


def test_codes_of_8_bits_are_faster_and_lose_little():
    times = DATA["step_cpu_ms"]["8192"]
    assert times["int8"] <= 0.65 * times["fp32"]
    assert DATA["loss"]["int8"]["tokens"] >= 2000
    assert DATA["loss"]["int8"]["kl_mean"] <= 0.0035


def test_the_page_shows_it():
    page = (ROOT / "docs" / "export.md").read_text()
    fp32 = DATA["step_cpu_ms"]["8192"]["fp32"]
    for codes in ("int8", "int4"):
        time, loss = DATA["step_cpu_ms"]["8192"][codes], DATA["loss"].get(codes)
        lost = "not measured | not measured"
        if loss:
            lost = f"{loss['kl_mean']:.4f} | {loss['perplexity_increase']:+.2f} %"
        assert f"| {codes} | {time:.1f} | {time / fp32:.2f} | {lost} |" in page
