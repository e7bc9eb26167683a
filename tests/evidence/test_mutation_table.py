"""The committed proof is of these kinds and of enough of them; some of its rows are proved again here."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from evidence.mutations.contradictions import CONTRADICTIONS
from evidence.mutations.kinds import MUTATIONS
from evidence.mutations.of_caches import CACHE_MUTATIONS
from evidence.mutations.of_chunks import CHUNK_MUTATIONS
from evidence.mutations.of_floats import FLOAT_MUTATIONS
from evidence.mutations.of_inputs import INPUT_CONTRADICTIONS
from evidence.mutations.of_quantized import MUTATIONS as QUANTIZED_MUTATIONS
from evidence.mutations.of_rings import RING_MUTATIONS
from evidence.mutations.of_shared import SHARED_MUTATIONS
from evidence.mutations.of_states import STATE_MUTATIONS
from evidence.mutations.table import (
    Row,
    contradiction_rows,
    judge_damage,
    mutation_row,
    open_sample,
    prove,
    shares,
    table,
)
from glassllm_checkpoint import write_glassllm
from gqa_models import write_tiny
from refusal import refused

import gqa_export
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx

ROOT = Path(gqa_export.__file__).parent.parent
DATA = json.loads((ROOT / "docs" / "benchmarks" / "mutations.json").read_text())
ROWS = [Row(row["kind"], row["breaks"], row["sample"], {k: tuple(v) for k, v in row["caught"].items()})
        for row in DATA["rows"]]


def test_the_committed_table_has_every_kind_that_the_code_knows():
    kinds = [kind.name for kind in (*MUTATIONS, *CONTRADICTIONS, *INPUT_CONTRADICTIONS)]
    assert [row.kind for row in ROWS] == kinds, "run scripts/mutation_table.py again and commit its result"
    assert len(MUTATIONS) >= 25


def test_quick_catches_nine_of_ten_and_full_catches_all():
    behaviour = ROWS[: len(MUTATIONS)]
    for rows in (ROWS, behaviour):
        assert shares(rows)["quick"] >= 0.9
        assert shares(rows)["full"] == 1.0
    # by a case of the suite: the manifest was made to agree, so nothing was refused beforehand
    assert not [row.kind for row in behaviour for name in row.caught["full"] if name.startswith("refused")]


def test_the_same_holds_on_a_model_of_135_million_parameters():
    data = json.loads((ROOT / "docs" / "benchmarks" / "mutations_smollm2.json").read_text())
    kinds = [row["kind"] for row in data["rows"]]
    absent = {m.name for m in MUTATIONS} - set(kinds)
    # it has no window, chunks, softcap, sinks, biases, norms of queries; its head is its embedding; `ort` masks by
    # itself and rotates inside attention; its layers keep nothing but keys and values, each its own and all of them,
    # and nothing of its bundle is quantized
    assert absent <= {"window longer", "window shorter", "window dropped", "softcap dropped", "sinks zeroed",
                      "sinks dropped", "bias dropped", "q norm dropped", "past one short", "mask upper-left",
                      "embedding row", "final softcap dropped", "whole rows miscounted",
                      *(m.name for m in (*CHUNK_MUTATIONS, *STATE_MUTATIONS, *QUANTIZED_MUTATIONS, *FLOAT_MUTATIONS,
                                         *RING_MUTATIONS, *SHARED_MUTATIONS, *CACHE_MUTATIONS[:-1]))}
    assert {c.name for c in CONTRADICTIONS} <= set(kinds), "run scripts/mutation_table.py --checkpoint again"
    caught = [row["caught"] for row in data["rows"]]
    assert sum(bool(row["quick"]) for row in caught) >= 0.9 * len(caught)
    assert all(row["full"] for row in caught)


def test_damage_to_what_is_quantized_is_caught_where_nothing_is_rounded():
    """By the strict verdict: what activations of 8 bits cost would hide half of it."""
    rows = {row.kind: row for row in ROWS}
    for mutation in QUANTIZED_MUTATIONS:
        quick = rows[mutation.name].caught["quick"]
        exact = [name for name in quick if not name.startswith("shipped ")]
        assert quick, mutation.name
        assert exact or mutation.name == "level 4 where 0 was promised"


def test_new_kinds_are_caught_by_nine_of_ten_and_all_too():
    """Experts, codes of caches and of floating-point numbers, rings, caches of other layers, caches in place: each
    group by itself, so that none hides behind the others; and on the targets that have it."""
    rows = {row.kind: row for row in ROWS}
    for kinds in (QUANTIZED_MUTATIONS, FLOAT_MUTATIONS, CACHE_MUTATIONS, RING_MUTATIONS, SHARED_MUTATIONS):
        group = [rows[mutation.name] for mutation in kinds]
        assert shares(group)["quick"] >= 0.9
        assert shares(group)["full"] == 1.0
    targets = {row.sample.split()[1].rstrip(",") for row in rows.values()
               if "cache" in row.sample or "fp" in row.sample}
    assert targets == {"ort", "onnx", "portable", "trt-native"}
    assert set(rows["newest at the end"].caught["full"]) == {"in_place"}, "the other cases bind no cache in place"


def test_rounded_inputs_that_contradict_one_another_are_refused_on_fp8_and_nvfp4():
    """No number tells of them: what is not rounded is nearer to the reference than what is."""
    rows = [row for row in ROWS if row.kind in {kind.name for kind in INPUT_CONTRADICTIONS}]
    assert len(rows) == len(INPUT_CONTRADICTIONS)
    for row in rows:
        assert all(len(names) == 1 and names[0].startswith("refused: ") for names in row.caught.values()), row.kind
    assert {row.sample for row in rows} == {"llama trt-native, fp8 inputs, kept", "llama trt-native, fp8 inputs",
                                            "llama trt-native, nvfp4 inputs"}


def test_a_new_kind_is_added_to_the_committed_rows_in_the_order_of_the_kinds(tmp_path):
    script = runpy.run_path(str(ROOT / "scripts" / "mutation_table.py"))
    few = [row for row in DATA["rows"] if row["kind"] not in ("scale wrong", "whole rows refused")]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": few}))
    new = [row for row in ROWS if row.kind in ("whole rows refused", "scale wrong", "epsilon")]
    assert script["merged"](new[::-1], tmp_path / "rows.json") == ROWS


def test_the_page_shows_the_committed_table():
    assert table(ROWS) in (ROOT / "docs" / "trust.md").read_text()


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A tiny llama for ort, its reference kept."""
    checkpoint = write_tiny("llama", tmp_path_factory.mktemp("ck"))
    bundle = tmp_path_factory.mktemp("b") / "bundle"
    export_onnx(checkpoint, bundle, ExportOptions(target="ort", capacity=128, dtype="fp32"))
    return open_sample("llama ort", bundle, checkpoint)


@pytest.mark.parametrize(("kind", "quick"), [
    ("scale wrong", {"teacher_forced", "free_running", "ragged"}), ("stale tail", {"ragged", "garbage_tail"}),
    ("rows leak", {"ragged", "garbage_tail"}), ("embedding row", {"special"}), ("guard dropped", {"refusals"}),
    ("whole rows refused", {"whole_row_mask"}),
    ("newest row lost", {"teacher_forced"}), ("weight row", {"teacher_forced", "free_running", "ragged"}),
    ("cos, sin in fp16", {"teacher_forced", "free_running", "ragged"}), ("tables too short", set()),
])
@pytest.mark.whole_model
def test_damage_is_caught_by_the_case_that_is_aimed_at_it(sample, tmp_path, kind, quick):
    mutation = next(m for m in MUTATIONS if m.name == kind)
    row = mutation_row(mutation, [sample], tmp_path)
    assert quick <= set(row.caught["quick"])
    assert row.caught["full"]
    if not quick:
        assert row.caught["quick"] == ()
        assert {"drift", "full_capacity"} <= set(row.caught["full"])


@pytest.fixture(scope="module")
def real_sample(tmp_path_factory):
    """glassllm, a small model that was really trained, its reference kept."""
    pytest.importorskip("glassllm", reason="glassllm is not installed: pip install glassllm==0.1.0")
    checkpoint = write_glassllm(tmp_path_factory.mktemp("glassllm"))
    bundle = tmp_path_factory.mktemp("b") / "bundle"
    export_onnx(checkpoint, bundle, ExportOptions(target="ort", capacity=128, dtype="fp32"))
    return open_sample("glassllm ort", bundle, checkpoint)


@pytest.mark.whole_model
def test_damage_to_a_real_small_model_is_caught(real_sample, tmp_path):
    rows = prove([real_sample], tmp_path, quick_first=True)  # the undamaged bundle is judged first, at `full`
    assert len(rows) >= 25, "glassllm has no window, sinks, softcap, biases or q norm; the other kinds apply"
    assert shares(rows)["quick"] >= 0.9
    assert [row.kind for row in rows if not row.caught["full"]] == []


@pytest.mark.whole_model
def test_every_contradiction_is_refused_and_names_what_is_wrong(sample, tmp_path):
    missed = [row.kind for row in contradiction_rows([sample], tmp_path) if not row.caught["quick"]]
    assert not missed


@pytest.mark.whole_model
def test_the_reference_is_computed_once_and_replayed_the_same(sample):
    nothing = {"quick": ()}
    assert judge_damage(sample, sample.bundle, "quick") == judge_damage(sample, sample.bundle, "quick") == nothing


@pytest.mark.whole_model
def test_the_quick_part_of_a_full_run_is_what_a_quick_run_says(sample, tmp_path):
    from evidence.mutations.mutation import break_bundle

    for kind in ("rows leak", "tables too short"):
        mutation = next(m for m in MUTATIONS if m.name == kind)
        bad = break_bundle(sample.bundle, tmp_path / kind, mutation.change)
        assert judge_damage(sample, bad, "quick")["quick"] == judge_damage(sample, bad, "full")["quick"]


@pytest.mark.whole_model
def test_a_sample_that_does_not_pass_proves_nothing(sample, tmp_path):
    from dataclasses import replace

    from evidence.mutations.mutation import break_bundle

    mutation = next(m for m in MUTATIONS if m.name == "scale wrong")
    bad = break_bundle(sample.bundle, tmp_path / "bad", mutation.change)
    with refused("E-VALIDATE-SAMPLE"):
        prove([replace(sample, bundle=bad)], tmp_path, kinds=())
