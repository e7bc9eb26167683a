"""Bundles of `--activations same` that contradict themselves, their text or their checkpoint are refused: each kind of
the mutation table, again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from evidence.mutations.of_inputs import INPUT_CONTRADICTIONS
from evidence.mutations.quantized_samples import TEXT, add_tokenizer, write_fp8
from evidence.mutations.table import Sample, contradiction_rows, needed
from gqa_models import write_tiny

from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx

pytestmark = pytest.mark.whole_model


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    """FP8 by a checkpoint's own scales, FP8 and NVFP4 by a text's. None is open: most kinds are refused before."""
    place = tmp_path_factory.mktemp("inputs")
    (place / "text.txt").write_text(TEXT)
    plain = add_tokenizer(write_tiny("llama", place / "plain", num_hidden_layers=2))
    found = []
    for name, checkpoint, method in (("kept", write_fp8(place / "kept"), ""), ("fp8", plain, "fp8"),
                                     ("nvfp4", plain, "nvfp4")):
        given = {"quantize": method, "calibrate": place / "text.txt"} if method else {}
        export_onnx(checkpoint, place / f"bundle of {name}", ExportOptions(
            target="trt-native", capacity=64, dtype="fp32", activations="same", **given))
        found.append(Sample(name, place / f"bundle of {name}", checkpoint, None, place / "text.txt"))
    return found


def test_each_is_refused_and_names_what_is_wrong(samples, tmp_path: Path) -> None:
    rows = list(contradiction_rows(samples, tmp_path, INPUT_CONTRADICTIONS))
    assert [row.kind for row in rows] == [kind.name for kind in INPUT_CONTRADICTIONS]
    assert [row.kind for row in rows if not row.caught["quick"]] == []
    assert {row.sample for row in rows} == {"kept", "fp8", "nvfp4"}


def test_a_refusal_of_another_kind_is_a_miss(samples, tmp_path: Path) -> None:
    """A row of the table says by which code, and what the refusal names."""
    kind = next(kind for kind in INPUT_CONTRADICTIONS if kind.name == "rounding of an input left out")
    for other in (replace(kind, code="E-BUNDLE-HASH"), replace(kind, facts=("layer 7",))):
        (row,) = contradiction_rows(samples[:1], tmp_path, [other])
        assert row.caught == {"quick": (), "full": ()}


def test_a_kind_is_tried_on_the_first_bundle_that_has_what_it_breaks(samples, tmp_path: Path) -> None:
    kinds = [kind for kind in INPUT_CONTRADICTIONS if "NVFP4" in kind.name or kind.text]
    assert [sample.name for sample in needed(samples, kinds, tmp_path)] == ["fp8", "nvfp4"]
    assert not list(contradiction_rows(samples[:1], tmp_path, kinds))
