"""A second graph for long prompts: on the same weights, beside an exact graph that stays, run when it pays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from gqa_models import write_tiny
from refusal import refused

import gqa_export as gqa
from gqa_export.bundle.long_facts import PREFILL
from gqa_export.bundle.manifest import DATA, MANIFEST, MODEL, read_manifest
from gqa_export.cli import main
from gqa_export.errors import GqaExportError, InvalidBundle
from gqa_export.exporting.long_plan import LongOptions, chosen_layers
from gqa_export.runtime.generate import generate
from gqa_export.runtime.ort.session import OrtSession

TILES = LongOptions("tiles", "last:2", leaf=64, heavy=64, samples=16, anchors=3, from_tokens=128)
HYPER = replace(TILES, method="hyper", heavy=16)
CASES = [("ort", "growing", TILES), ("ort", "static", HYPER), ("portable", "growing", HYPER),
         ("portable", "static", TILES)]
IDS = np.random.default_rng(0).integers(3, 320, (2, 300))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("long") / "llama")


@pytest.fixture(scope="module")
def bundles(checkpoint, tmp_path_factory) -> dict[tuple[str, str], gqa.Bundle]:
    place = tmp_path_factory.mktemp("bundles")
    return {(target, cache): gqa.export(checkpoint, place / f"{target}-{cache}", target=target, cache=cache,
                                        long_attention=options) for target, cache, options in CASES}


@pytest.mark.parametrize(("target", "cache", "options"), CASES)
def test_the_exact_graph_and_the_weights_are_those_of_a_plain_export(bundles, checkpoint, tmp_path, target, cache,
                                                                     options) -> None:
    plain, bundle = gqa.export(checkpoint, tmp_path / "plain", target=target, cache=cache), bundles[target, cache]
    for name in (MODEL, DATA):
        assert (plain.folder / name).read_bytes() == (bundle.folder / name).read_bytes()
    assert "long" not in json.loads((plain.folder / MANIFEST).read_text())
    plan = read_manifest(bundle.folder).long.plan
    assert (plan.layers, plan.setting.method, plan.from_tokens) == ((1, 2), options.method, 128)
    calls = [node.op_type for node in onnx.load(bundle.folder / PREFILL, load_external_data=False).graph.node
             if "Attention" in node.op_type]
    assert calls.count("LongGroupedQueryAttention") == 2
    assert len(calls) == 3


@pytest.mark.parametrize(("target", "cache"), [case[:2] for case in CASES])
def test_long_prompts_run_it_and_everything_else_is_exact(bundles, target, cache) -> None:
    exact, long = (OrtSession.load(bundles[target, cache].folder, "cpu", approximate=flag) for flag in (False, True))
    for session in (exact, long):
        session.reset(2)
    short = [session.step(IDS[:, :128]).logits for session in (exact, long)]
    assert np.array_equal(*short)
    assert long.long_calls == 0
    whole = []
    for session in (exact, long):
        session.reset(2)
        step = session.step(IDS, np.array([300, 200]), want_cache=True)
        whole.append((step, session.step(IDS[:, :1]).logits))
    assert (long.long_calls, exact.long_calls) == (1, 0)
    for b, count in enumerate((300, 200)):
        apart = np.abs(whole[0][0].logits[b, :count] - whole[1][0].logits[b, :count])
        assert apart[:64].max() <= 1e-4, "rows of the first leaf see no key outside of it"
        assert apart.max() > 1e-2, "nothing was approximated"
        assert np.abs(whole[0][0].keys[0][b, :, :count] - whole[1][0].keys[0][b, :, :count]).max() <= 1e-5
    assert np.isfinite(whole[1][1]).all()


@pytest.mark.parametrize(("target", "cache"), [case[:2] for case in CASES])
def test_a_decode_step_after_it_continues_its_own_cache(bundles, target, cache) -> None:
    """One call of the whole prompt, then a step, equals the prompt in pieces that end at leaves, then the step."""
    logits = []
    for pieces in ([300], [64, 128, 108]):
        session = OrtSession.load(bundles[target, cache].folder, "cpu", approximate=True)
        session._plan = replace(session._plan, from_tokens=1)
        session.reset(1)
        at = 0
        for piece in pieces:
            session.step(IDS[:1, at: at + piece])
            at += piece
        logits.append(session.step(IDS[:1, :1]).logits)
    assert np.abs(logits[0] - logits[1]).max() <= 1e-4


def test_a_prompt_is_fed_in_pieces_that_end_at_leaves(bundles) -> None:
    session, seen = OrtSession.load(bundles["ort", "growing"].folder, "cpu", approximate=True), []
    step = session.step
    session.step = lambda ids, new=None: (seen.append(ids.shape[1]), step(ids, new))[1]  # type: ignore[method-assign]
    generate(session, [IDS[0].tolist()], 1, prefill_piece=70)
    assert seen == [128, 128, 44]
    assert session.long_calls == 2


def test_run_and_bench_take_it_unless_exact_is_given(bundles) -> None:
    folder, ids = str(bundles["ort", "growing"].folder), ",".join(map(str, IDS[0]))
    command = ["run", folder, "--token-ids", ids, "--max-new-tokens", "8", "--json"]
    answers = [json.loads(CliRunner().invoke(main, [*command, *extra]).stdout)["tokens"] for extra in ([], ["--exact"])]
    assert answers[0] != answers[1]


@pytest.mark.parametrize(("target", "word"), [("onnx", "Attention"), ("trt-native", "Attention")])
def test_targets_without_it_refuse_it_by_name(checkpoint, tmp_path, target, word) -> None:
    with refused("E-TARGET-LONG") as found:
        gqa.export(checkpoint, tmp_path / "out", target=target, long_attention=TILES)
    assert word in found.error.what
    assert target in found.error.what
    assert "portable" in found.error.fix


@pytest.mark.parametrize("changes", [
    {"method": "lsh"}, {"layers": "last:0"}, {"layers": "first:2"}, {"layers": "0-"}, {"layers": "7"},
    {"layers": "1-9"},
    {"layers": ""}, {"layers": "auto"}, {"leaf": 100, "method": "hyper"}, {"heavy": 40}, {"from_tokens": 512},
    {"leaf": None, "from_tokens": None}], ids=str)
def test_options_that_cannot_be_held_are_refused(checkpoint, tmp_path, changes) -> None:
    with refused("E-OPTION-LONG"):
        gqa.export(checkpoint, tmp_path / "out", long_attention=replace(TILES, **changes))
    assert not (tmp_path / "out").exists()


def test_layers_with_a_window_stay_exact(tmp_path) -> None:
    spec = gqa.export(write_tiny("gemma3", tmp_path / "gemma3"), tmp_path / "plain").manifest.spec
    able = [layer.layer for layer in spec.layers if not layer.window]
    assert able
    assert len(able) < len(spec.layers)
    assert list(chosen_layers("all", spec)) == able
    bundle = gqa.export(tmp_path / "gemma3", tmp_path / "out", long_attention=replace(TILES, layers="all"))
    assert list(bundle.manifest.long.plan.layers) == able
    assert any("stay exact" in note for note in bundle.exported.notes)
    windowed = next(layer.layer for layer in spec.layers if layer.window)
    with refused("E-OPTION-LONG"):
        gqa.export(tmp_path / "gemma3", tmp_path / "other", long_attention=replace(TILES, layers=str(windowed)))


@pytest.mark.parametrize(("damage", "code"), [
    (lambda facts: facts["long"]["plan"].update(layers=[9]), "E-BUNDLE-MANIFEST"),
    (lambda facts: facts["long"]["plan"].update(seed=1), "E-BUNDLE-MANIFEST"),
    (lambda facts: facts["long"]["plan"]["setting"].update(leaf=100), "E-BUNDLE-MANIFEST"),
    (lambda facts: facts["long"].update(other=1), "E-BUNDLE-MANIFEST"),
    (lambda facts: facts["files"].pop(PREFILL), "E-BUNDLE-UNLISTED")])
def test_a_manifest_that_contradicts_itself_is_refused(bundles, tmp_path, damage, code) -> None:
    import shutil

    from gqa_export.bundle.integrity import check_files

    folder = Path(shutil.copytree(bundles["ort", "growing"].folder, tmp_path / "copy"))
    facts = json.loads((folder / MANIFEST).read_text())
    damage(facts)
    (folder / MANIFEST).write_text(json.dumps(facts))
    with refused(code, InvalidBundle):
        check_files(folder, read_manifest(folder))


def test_a_missing_or_changed_graph_is_refused(bundles, tmp_path) -> None:
    import shutil

    folder = Path(shutil.copytree(bundles["ort", "growing"].folder, tmp_path / "copy"))
    changed = (folder / PREFILL).read_bytes().replace(b"selection", b"sElection", 1)
    (folder / PREFILL).write_bytes(changed)
    with refused("E-BUNDLE-HASH", InvalidBundle):
        OrtSession.load(folder, "cpu", approximate=True)
    (folder / PREFILL).unlink()
    with refused("E-BUNDLE-FILE", InvalidBundle):
        OrtSession.load(folder, "cpu")


def test_options_of_it_without_it_are_a_usage_error(checkpoint, tmp_path) -> None:
    done = CliRunner().invoke(main, ["onnx", str(checkpoint), "-o", str(tmp_path / "out"), "--long-leaf", "64"])
    assert done.exit_code == 2
    assert "--long-attention" in done.stderr


def test_links_to_a_checkpoint_are_shared_too(checkpoint, tmp_path) -> None:
    bundle = gqa.export(checkpoint, tmp_path / "out", weights="link", long_attention=TILES)
    assert not (bundle.folder / DATA).exists()
    session = OrtSession.load(bundle.folder, "cpu", approximate=True)
    assert np.isfinite(session.step(IDS[:1]).logits).all()
    assert session.long_calls == 1


def test_a_dry_run_lists_the_graph(checkpoint) -> None:
    plan = gqa.plan_export(checkpoint, long_attention=TILES)
    assert PREFILL in [name for name, *_ in plan.files]


def test_all_refusals_are_errors_of_ours() -> None:
    with pytest.raises(GqaExportError):
        LongOptions("x").setting()


@pytest.mark.parametrize(("options", "code", "word"), [
    ({"quantize": "int4"}, "E-OPTION-LONG-INT8", "--activations exact"),
    ({"quantize": "int8", "activations": "int8"}, "E-OPTION-LONG-INT8", "--activations exact"),
    ({"target": "trt-plugin", "quantize": "fp8", "calibrate": "text.txt", "activations": "same"}, "E-OPTION-LONG-INT8",
     "--activations exact"), ({"kv_cache": "int8"}, "E-OPTION-LONG-CODES", "--kv-cache int8"),
    ({"kv_cache": "int4"}, "E-OPTION-LONG-CODES", "--kv-cache int4"),
    ({"lora": ["adapter"]}, "E-OPTION-LORA", "--merge-lora"),
    ({"tensor_parallel": 2}, "E-OPTION-TENSOR-PARALLEL", "leave out"),
    ({"tensor_parallel": 2, "target": "trt-plugin"}, "E-OPTION-TENSOR-PARALLEL", "leave out")], ids=str)
def test_what_a_graph_for_long_prompts_does_not_go_with_is_refused_by_name(checkpoint, tmp_path, options, code,
                                                                            word) -> None:
    with refused(code) as found:
        gqa.export(checkpoint, tmp_path / "out", long_attention=TILES, **options)
    assert "long" in found.error.what + found.error.where
    assert word in found.error.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("leaf", [1, 7, 24, 40, 64, 100, 128, 384, 1024])
def test_tiles_take_every_leaf_up_to_128_and_its_multiples(leaf) -> None:
    setting = LongOptions("tiles", leaf=leaf).setting()
    assert setting.problems(1 << 20) == []
    assert leaf % setting.block == leaf % setting.tile == 0
    assert setting.block == 32 or leaf % 32


@pytest.mark.parametrize("leaf", [129, 200, 1000])
def test_tiles_refuse_other_leaves_with_the_reason(leaf) -> None:
    assert f"leaf {leaf} is not a multiple of tile 128" in LongOptions("tiles", leaf=leaf).setting().problems(1 << 20)


def test_a_hybrid_keeps_its_states_beside_it(tmp_path) -> None:
    """Layers that keep a state of fixed size read no keys: they are as in the exact graph, and pass states on."""
    checkpoint = write_tiny("qwen3_next", tmp_path / "hybrid")
    bundle = gqa.export(checkpoint, tmp_path / "out", long_attention=replace(HYPER, layers="all"))
    spec = bundle.manifest.spec
    assert spec.states
    assert set(bundle.manifest.long.plan.layers).isdisjoint(state.layer for state in spec.states)
    verdict = bundle.validate(checkpoint, steps=1)
    assert verdict.passed
    assert {"long_prompt", "long_ragged", "long_leaf"} <= {case.name for case in verdict.cases}


def test_hidden_states_are_an_output_of_both_graphs(checkpoint, tmp_path) -> None:
    folder = gqa.export(checkpoint, tmp_path / "out", hidden_states=True, long_attention=TILES).folder
    exact, long = (OrtSession.load(folder, "cpu", approximate=flag).step(IDS[:1]) for flag in (False, True))
    assert exact.hidden.shape == long.hidden.shape
    assert np.abs(exact.hidden - long.hidden)[:, :64].max() <= 1e-4, "rows of the first leaf see no key outside of it"
    assert np.abs(exact.hidden - long.hidden).max() > 1e-2, "nothing was approximated"
