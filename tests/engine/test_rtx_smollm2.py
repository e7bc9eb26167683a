"""Engines of a real model, SmolLM2-135M: with the plugin, and with TensorRT's own attention.

Its first two layers are built here, with its own weights, tokenizer and sizes; all thirty by
scripts/smollm2_engines.py, whose committed result is held to what it was made to show and to the graphs that this code
makes. The other types (bf16, fp32) are built of tiny models: nothing in them depends on the size.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import smollm2_engines as script

from .built import CAPABILITIES, build, check, check_plugin

pytestmark = pytest.mark.whole_model
COMMITTED = Path(__file__).parents[2] / "docs" / "benchmarks" / "smollm2_engines.json"


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads(COMMITTED.read_text(encoding="utf-8"))["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("attention", script.ATTENTION)
def test_the_first_layers_of_a_real_model(rtx, smollm2_cut, tmp_path, committed, attention: str) -> None:
    bundle = script.export(smollm2_cut, tmp_path / "bundle", attention)
    assert committed[attention]["structure"] == script.structure(bundle), "run scripts/smollm2_engines.py again"
    built = build(bundle, tmp_path / "engine")
    if attention == "plugin":
        check_plugin(built, bundle, variants=4)
    else:
        check(built, bundle, "native")
    assert len(built.manifest.spec.layers) == script.CUT
    assert (built.folder / "tokenizer.json").is_file()


@pytest.mark.parametrize("attention", script.ATTENTION)
def test_all_thirty_layers_were_built(committed, attention: str) -> None:
    """What `check` and `check_plugin` hold every engine to."""
    row = committed[attention]
    assert (row["layers"], row["attention"], row["flavor"]) == (script.LAYERS, attention, "rtx")
    assert tuple(row["capabilities"]) == CAPABILITIES
    assert row["aliases"] == 2 * script.LAYERS
    assert row["tokenizer"]
    assert list(row["listed"]) == ["decode", "prefill"]
    for kinds in row["listed"].values():
        assert kinds.get("PluginV3", 0) == (script.LAYERS if attention == "plugin" else 0)
        assert "Reformat" not in kinds
    assert row["engine_bytes"] < 2 * row["weight_bytes"] + row["kernel_bytes"] + (8 << 20) * script.LAYERS
    if attention == "plugin":
        assert (row["containers"], row["kernels"]) == (1, 4 * len(CAPABILITIES))
        assert row["least_named"] >= 1 + 2
        # The promise is a minute on two cores; processor time does not depend on who else works there.
        assert row["processor_s"] <= 60, "even one core would do"
