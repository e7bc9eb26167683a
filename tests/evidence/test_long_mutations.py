"""A graph for long prompts passes `validate --level full`, and each way of damaging it fails there."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest
from evidence.mutations.of_long import LONG_MUTATIONS, OPTIONS, broken_bundle
from evidence.mutations.table import Row, shares
from gqa_models import write_tiny

import gqa_export as gqa
from gqa_export.bundle.manifest import read_manifest
from gqa_export.compare.case_verdict import CaseVerdict
from gqa_export.progress import silent
from gqa_export.report import html, junit
from gqa_export.report.outcome import Outcome
from gqa_export.validation.long_cases import judge_long
from gqa_export.validation.reference import Reference, open_reference

ROOT = Path(gqa.__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("long") / "llama")


@pytest.fixture(scope="module")
def bundles(checkpoint, tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("bundles")
    return {method: gqa.export(checkpoint, place / method, target="ort", cache=cache, long_attention=options).folder
            for (method, options), cache in zip(OPTIONS.items(), ("growing", "static"))}


@pytest.fixture(scope="module")
def reference(checkpoint, bundles) -> Reference:
    return open_reference(checkpoint, read_manifest(bundles["tiles"]), "float32", [])


def first_failure(folder: Path, reference: Reference) -> CaseVerdict | None:
    manifest = read_manifest(folder)
    return next((case for case, _ in judge_long(folder, manifest, "cpu", reference, "float32", "full", silent, 1)
                 if not case.passed), None)


@pytest.mark.parametrize("method", OPTIONS)
def test_validate_compares_it_and_every_report_shows_it(bundles, checkpoint, method) -> None:
    verdict = gqa.open_bundle(bundles[method]).validate(checkpoint, level="full", steps=2)
    assert verdict.passed
    names = [case.name for case in verdict.cases if case.name.startswith("long_")]
    assert names == ["long_prompt", "long_ragged", "long_leaf", "long_chunks", "long_many", "long_steps"]
    lines = [note for note in verdict.notes if "selections are the fp64 reference's" in note]
    assert len(lines) >= len(names) - 1
    json.loads(verdict.to_json())
    outcome = Outcome((str(bundles[method]),), str(checkpoint), (verdict,))
    assert "long_ragged" in html.page(outcome)
    assert ElementTree.fromstring(junit.text(outcome)).get("failures") == "0"


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("mutation", LONG_MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_damage_is_caught(bundles, reference, tmp_path, method, mutation) -> None:
    found = first_failure(broken_bundle(bundles[method], tmp_path / "broken", mutation), reference)
    assert found is not None
    assert found.first is not None
    assert found.name in str(found.first)


def test_another_selection_than_the_reference_s_is_named_with_its_layer(bundles, reference, tmp_path) -> None:
    from evidence.mutations.of_long import directions_changed

    found = first_failure(broken_bundle(bundles["hyper"], tmp_path / "broken", directions_changed), reference)
    assert found is not None
    kind = next(kind for kind in found.kinds if kind.kind == "selection")
    assert kind.max_abs > kind.bound > 0
    assert "layer 1" in kind.first.output


def test_a_graph_that_gives_the_last_logits_only_is_compared_too(checkpoint, reference, tmp_path) -> None:
    folder = gqa.export(checkpoint, tmp_path / "good", logits="last", long_attention=OPTIONS["hyper"]).folder
    assert first_failure(folder, reference) is None
    assert first_failure(broken_bundle(folder, tmp_path / "broken", LONG_MUTATIONS[0]), reference) is not None


def test_the_committed_table_has_every_kind_of_both_methods_all_are_caught_and_the_page_shows_it() -> None:
    data = json.loads((ROOT / "docs" / "benchmarks" / "long_mutations.json").read_text())
    rows = [Row(**{**row, "caught": {level: tuple(names) for level, names in row["caught"].items()}}) for row in data]
    assert [(row.kind, row.sample) for row in rows] == [
        (change.__name__.replace("_", " "), f"llama ort, {method}") for method in OPTIONS for change in LONG_MUTATIONS
    ], "run scripts/long_mutation_table.py again and commit its result"
    assert shares(rows)["full"] == 1.0
    script = runpy.run_path(str(ROOT / "scripts" / "long_mutation_table.py"))
    assert script["text_of"](rows) in (ROOT / "docs" / "trust.md").read_text()
