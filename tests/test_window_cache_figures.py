"""The committed bytes of caches with and without rings are what the exporter's own arithmetic gives now."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_shows_what_the_script_computes() -> None:
    spec = importlib.util.spec_from_file_location("window_cache", ROOT / "scripts" / "window_cache.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["window_cache"] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    report = json.loads((script.OUT / f"{script.NAME}.json").read_text())
    assert report == script.figures(), "run scripts/window_cache.py"
    assert (script.OUT / f"{script.NAME}.md").read_text() == script.page(report)
    mistral = report["models"]["Mistral 7B v0.1"]  # by hand: 32 layers of 8 heads, keys and values of 128, two bytes
    assert mistral["whole"] == 32 * 8 * 2 * 128 * 2 * 32768
    assert mistral["small"]["512"] * 32768 == mistral["whole"] * (4096 + 512)
    gemma = report["sharing"]["Gemma 3n E2B"]  # 20 of 30 layers of 2 heads, keys and values of 256, two bytes
    assert gemma["copies"] == 30 * 2 * 2 * 256 * 2 * 32768
    assert gemma["whole"] == 20 * 2 * 2 * 256 * 2 * 32768
    assert gemma["small"] * 32768 * 20 == gemma["whole"] * (4 * 32768 + 16 * (512 + 512))
