"""`--window-cache small`: which layers keep a ring, what says so, and what is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from gqa_models import write_tiny
from refusal import refused

import gqa_export as gqa
from gqa_export import attention_op
from gqa_export.bundle.attention_claims import check_claims
from gqa_export.bundle.manifest import MANIFEST, MODEL, Manifest, read_manifest
from gqa_export.cli import main
from gqa_export.errors import GqaExportError, InvalidBundle, UnsupportedModel
from gqa_export.spec import WindowCache

pytestmark = pytest.mark.whole_model
SMALL = {"window_cache": "small", "prompt_chunk": 5}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Layers 0 and 1 have a window of 16, layer 2 sees all."""
    return write_tiny("gemma3", tmp_path_factory.mktemp("gemma3"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory) -> gqa.Bundle:
    return gqa.export(checkpoint, tmp_path_factory.mktemp("b") / "small", target="portable", capacity=64, **SMALL)


def test_windowed_layers_keep_a_ring_and_the_others_the_capacity(bundle) -> None:
    manifest = bundle.manifest
    assert manifest.window_cache == WindowCache(5, (0, 1))
    assert (manifest.cache, manifest.capacity, manifest.verify_width) == ("static", 64, 5)
    axes = {fact.name: fact.shape[2] for fact in (*manifest.inputs, *manifest.outputs) if len(fact.shape) == 4}
    assert {axes[f"{side}.{layer}.{kind}"] for side in ("past_key_values", "present") for layer in (0, 1)
            for kind in ("key", "value")} == {21}
    assert {axes["past_key_values.2.key"], axes["present.2.value"]} == {"capacity"}
    graph = onnx.load(str(bundle.folder / MODEL), load_external_data=False).graph
    modes = [attribute.i for node in graph.node if node.op_type == attention_op.OP for attribute in node.attribute
             if attribute.name == "growing"]
    assert modes == [attention_op.RING, attention_op.RING, 0]
    assert read_manifest(bundle.folder) == manifest


def test_inspect_says_what_is_kept_and_what_it_costs(bundle) -> None:
    shown = CliRunner().invoke(main, ["inspect", str(bundle.folder)]).output
    assert "window cache: layers 0-1 keep 21 tokens of 64: a window of 16 and a prompt chunk of 5" in shown
    layer = bundle.manifest.spec.layers[0].cache_bytes_per_token(4)
    assert gqa.inspect(bundle.folder).costs[-1].bytes == layer * (21 + 21 + 64)


def test_without_the_option_no_byte_of_an_export_changes(checkpoint, tmp_path) -> None:
    """The manifest does not even name it."""
    plain = gqa.export(checkpoint, tmp_path / "plain", target="portable", cache="static", capacity=64)
    full = gqa.export(checkpoint, tmp_path / "full", target="portable", cache="static", capacity=64,
                      window_cache="full")
    assert (plain.folder / MODEL).read_bytes() == (full.folder / MODEL).read_bytes()
    assert "window_cache" not in json.loads((plain.folder / MANIFEST).read_text())
    assert plain.manifest.window_cache is None


def test_where_nothing_would_be_less_a_note_says_so(checkpoint, tmp_path) -> None:
    done = gqa.export(checkpoint, tmp_path / "b", target="portable", capacity=64, window_cache="small")
    assert done.manifest.window_cache is None
    assert any("changes nothing: the narrowest window of 16 tokens and a prompt chunk of 512" in note
               for note in done.exported.notes)
    llama = gqa.export(write_tiny("llama", tmp_path / "llama", num_hidden_layers=2), tmp_path / "c", target="portable",
                       capacity=64, **SMALL)
    assert any("no layer has a window" in note for note in llama.exported.notes)


@pytest.mark.parametrize(("options", "code"), [
    ({"target": "onnx"}, "E-TARGET-WINDOW-CACHE"), ({"target": "trt-native"}, "E-TARGET-WINDOW-CACHE"),
    ({"cache": "growing"}, "E-OPTION-WINDOW-CACHE"), ({"window_cache": "full"}, "E-OPTION-WINDOW-CACHE"),
    ({"window_cache": "tiny"}, "E-OPTION-CHOICE"), ({"prompt_chunk": 0}, "E-OPTION-COUNT")])
def test_what_cannot_be_had_is_refused_by_name(checkpoint, tmp_path, options, code) -> None:
    with refused(code, GqaExportError):
        gqa.export(checkpoint, tmp_path / "b", **{"target": "portable", "capacity": 64, **SMALL, **options})
    assert not (tmp_path / "b").exists()


def test_options_that_no_ring_goes_with_are_refused_by_name() -> None:
    from gqa_export.exporting.long_plan import LongOptions
    from gqa_export.exporting.options import ExportOptions
    from gqa_export.exporting.window_plan import check_window_options
    from gqa_export.targets import get_target

    options = ExportOptions("portable", cache="static", window_cache="small")
    for other in (replace(options, kv_cache="int8"), replace(options, long=LongOptions()),
                  replace(options, tensor_parallel=2)):
        with refused("E-OPTION-WINDOW-CACHE", GqaExportError):
            check_window_options(other, get_target("portable"))


def test_bisect_refuses_rings_by_name(bundle, checkpoint) -> None:
    from gqa_export.bisect.bisection import bisect

    with refused("E-VALIDATE-BISECT-RINGS", UnsupportedModel):
        bisect(bundle.folder, checkpoint)


@pytest.mark.parametrize("change", [
    {"window_cache": {"chunk": 5, "layers": [0, 2]}}, {"window_cache": {"chunk": 6, "layers": [0, 1]}},
    {"window_cache": {"chunk": 5, "layers": [1, 0]}}, {"window_cache": {"chunk": 60, "layers": [0, 1]}},
    {"window_cache": {"chunk": 5, "layers": []}}, {"window_cache": {"chunk": 0, "layers": [0]}},
    {"window_cache": {"chunk": 5, "layers": [0, 1, 9]}}, {"cache": "growing"}])
def test_a_manifest_whose_rings_cannot_be_is_refused(bundle, change) -> None:
    data = {**json.loads((bundle.folder / MANIFEST).read_text()), **change}
    with refused("E-BUNDLE-MANIFEST", InvalidBundle):
        Manifest.from_json(json.dumps(data))


def test_a_graph_with_other_rings_than_its_manifest_is_refused(bundle, checkpoint, tmp_path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    model = onnx.load(str(bundle.folder / MODEL), load_external_data=False)
    call = next(node for node in model.graph.node if node.op_type == attention_op.OP)
    next(attribute for attribute in call.attribute if attribute.name == "growing").i = 0
    onnx.save(model, str(folder / MODEL))
    with refused("E-BUNDLE-CLAIM", InvalidBundle):
        check_claims(folder, bundle.manifest)


def test_a_target_without_rings_falls_back_to_the_whole_capacity_and_says_so(checkpoint, tmp_path) -> None:
    done = gqa.export(checkpoint, tmp_path / "ort", target="ort", capacity=64, **SMALL)
    assert done.manifest.window_cache is None
    assert done.manifest.cache == "static"
    assert [(each.layer, each.wanted, each.used) for each in done.manifest.fallbacks] == [
        (layer, "a cache of 21 slots", "a cache of 64 tokens") for layer in (0, 1)]
    assert "fallback: layer 0: a cache of 64 tokens instead of a cache of 21 slots" in CliRunner().invoke(
        main, ["inspect", str(done.folder)]).output
    graph = onnx.load(str(done.folder / MODEL), load_external_data=False).graph
    assert sum(node.op_type == "GroupQueryAttention" for node in graph.node) == 3


def test_a_layer_that_reads_another_s_cache_is_not_said_to_keep_one() -> None:
    from gqa_export.exporting.options import ExportOptions
    from gqa_export.exporting.window_plan import window_plan
    from gqa_export.spec import AttentionSpec, ModelSpec
    from gqa_export.targets import get_target

    layers = tuple(AttentionSpec(number, 4, 2, 16, 16, 0.25, window=window, owner=owner)
                   for number, (window, owner) in enumerate([(16, None), (0, None), (16, 0), (0, 1)]))
    spec = ModelSpec("gemma3n_text", "Gemma3n", 100, 64, 512, "", layers)
    found = window_plan(ExportOptions("ort", cache="static", **SMALL), get_target("ort"), spec, 256)
    assert [each.layer for each in found.fallbacks] == [0]


def test_a_longrope_model_keeps_whole_caches() -> None:
    from gqa_export.exporting.options import ExportOptions
    from gqa_export.exporting.window_plan import window_plan
    from gqa_export.spec import AttentionSpec, ModelSpec
    from gqa_export.targets import get_target

    layer = AttentionSpec(0, 4, 2, 16, 16, 0.25, window=16)
    spec = ModelSpec("phi3", "Phi3", 100, 64, 512, "longrope", (layer,), rope_switch=128)
    with refused("E-MODEL-WINDOW-ROPE", UnsupportedModel):
        window_plan(ExportOptions("portable", cache="static", **SMALL), get_target("portable"), spec, 256)


def test_attention_in_chunks_of_positions_keeps_whole_caches() -> None:
    from gqa_export.spec import AttentionSpec

    assert WindowCache.of((AttentionSpec(0, 4, 2, 16, 16, 0.25, window=-16),), 256, 5) is None
