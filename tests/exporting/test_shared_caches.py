"""Layers that read another layer's keys and values (Gemma 3n, Gemma 4) keep no copy of them, on any target."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from evidence.mutations.mutation import NotHere, break_bundle
from evidence.mutations.of_shared import SHARED_MUTATIONS
from gqa_models import write_tiny
from refusal import refused

import gqa_export as gqa
from gqa_export.bundle.manifest import MANIFEST, MODEL, Manifest
from gqa_export.cli import main
from gqa_export.errors import InvalidBundle, NotCheckedHere, UnsupportedModel
from gqa_export.exporting import shared_caches
from gqa_export.graph_io import CacheReaders, layer_of_cache
from gqa_export.runtime.ort.loading import check_needs
from gqa_export.spec import AttentionSpec, WindowCache

pytestmark = pytest.mark.whole_model
OWNERS = [None, None, 0, 1]
"""of the tiny Gemma 3n and 4: a windowed layer and a whole one, and one of each kind that reads the cache of that"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write_tiny(name, tmp_path_factory.mktemp(name) / "checkpoint")
        return made[name]

    return get


@pytest.fixture(scope="module")
def bundles(checkpoints, tmp_path_factory):
    made: dict[tuple, gqa.Bundle] = {}

    def get(name: str = "gemma3n", **options) -> gqa.Bundle:
        key = (name, *sorted(options.items()))
        if key not in made:
            made[key] = gqa.export(checkpoints(name), tmp_path_factory.mktemp("b") / "bundle", capacity=64,
                                   dtype="fp32", **options)
        return made[key]

    return get


def graph_of(bundle: gqa.Bundle) -> onnx.GraphProto:
    return onnx.load(str(bundle.folder / MODEL), load_external_data=False).graph


@pytest.mark.parametrize(("name", "options"), [
    ("gemma3n", {"target": "ort"}), ("gemma4", {"target": "ort", "cache": "static"}),
    ("gemma3n", {"target": "onnx"}), ("gemma4", {"target": "onnx", "cache": "static"}),
    ("gemma3n", {"target": "portable"}), ("gemma4", {"target": "trt-native"}),
    ("gemma3n", {"target": "trt-plugin", "window_cache": "small", "prompt_chunk": 8}),
], ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())))
def test_only_layers_with_keys_of_their_own_have_a_cache_and_the_answers_are_the_same(name, options, bundles,
                                                                                     checkpoints):
    bundle = bundles(name, **options)
    manifest = bundle.manifest
    assert [layer.owner for layer in manifest.spec.layers] == OWNERS
    graph = graph_of(bundle)
    for ports in (graph.input, graph.output, manifest.inputs, manifest.outputs):
        numbers = [number for port in ports if (number := layer_of_cache(port.name)) is not None]
        assert numbers == [0, 0, 1, 1]
    verdict = bundle.validate(checkpoints(name), steps=2).check()
    assert {"new keys and values", "cache"} <= set(verdict.compared)
    if "window_cache" in options:
        assert manifest.window_cache == WindowCache(8, (0,))


def test_the_operator_of_onnxruntime_reads_the_owners_present_and_adds_no_token(bundles):
    bundle = bundles(target="ort")
    calls = [node for node in graph_of(bundle).node if node.op_type == "GroupQueryAttention"]
    assert [len(node.output) for node in calls] == [3, 3, 1, 1]
    assert [list(node.input[3:5]) for node in calls[2:]] == [
        [f"present.{owner}.{kind}" for kind in ("key", "value")] for owner in (0, 1)]
    assert calls[2].input[1] == calls[2].input[2]
    assert bundle.manifest.needs == {"onnxruntime": "1.31"}
    with refused("E-ENV-VERSION", NotCheckedHere):
        check_needs(bundle.manifest, "1.30.0")
    assert "genai_config.json" not in bundle.manifest.files


@pytest.mark.parametrize(("version", "options"), [("1.30.1", {}), ("1.33.0", {"ragged_chunks": True})])
def test_an_operator_that_cannot_adds_the_same_tokens_to_the_same_past(version, options, checkpoints, tmp_path,
                                                                       monkeypatch):
    monkeypatch.setattr(shared_caches, "installed_version", lambda name: version)
    bundle = gqa.export(checkpoints("gemma4"), tmp_path / "b", capacity=64, dtype="fp32", cache="static", **options)
    calls = [node for node in graph_of(bundle).node if node.op_type == "GroupQueryAttention"]
    assert [list(node.input[3:5]) for node in calls[2:]] == [
        [f"past_key_values.{owner}.{kind}" for kind in ("key", "value")] for owner in (0, 1)]
    assert bundle.manifest.needs == ({"onnxruntime": "1.32"} if options else {})
    assert len(bundle.manifest.inputs) == 2 + 4
    bundle.validate(checkpoints("gemma4"), steps=2).check()


def test_sessions_and_inspect_count_caches_not_layers(bundles):
    bundle = bundles(target="ort")
    session = bundle.session()
    session.step(np.array([[5, 6, 7]]))
    assert len(session.cache()) == 2
    assert len(bundle.complete(token_ids=[5, 6, 7], max_new_tokens=4).tokens) == 4
    found = gqa.inspect(bundle.folder)
    layers = bundle.manifest.spec.layers
    assert found.costs[0].bytes == 2 * 4 * layers[0].kv_num_heads * (layers[0].head_size + layers[0].value_head_size)
    shown = CliRunner().invoke(main, ["inspect", str(bundle.folder)]).output
    assert "layer 2 reads the cache of layer 0" in shown
    assert "layer 3 reads the cache of layer 1" in shown


@pytest.mark.parametrize(("target", "damage"), [("ort", SHARED_MUTATIONS[0]), ("ort", SHARED_MUTATIONS[1]),
                                                ("onnx", SHARED_MUTATIONS[0]), ("portable", SHARED_MUTATIONS[0])],
                         ids=lambda value: getattr(value, "name", value))
def test_damage_to_what_a_layer_reads_is_caught(target, damage, bundles, checkpoints, tmp_path):
    broken = break_bundle(bundles(target=target).folder, tmp_path / "broken", damage.change)
    verdict = gqa.open_bundle(broken).validate(checkpoints("gemma3n"), steps=1)
    assert not verdict.passed
    assert verdict.first.output == "logits"


def test_what_reads_no_other_cache_has_nothing_to_break(bundles, tmp_path):
    with pytest.raises(NotHere):  # the function of `portable` reads its owner's past and writes the present again
        break_bundle(bundles(target="portable").folder, tmp_path / "broken", SHARED_MUTATIONS[1].change)


def manifest_with(bundle: gqa.Bundle, **changes: int | None) -> Manifest:
    """With other owners: name "layer_2" is layer 2."""
    spec = bundle.manifest.spec
    layers = tuple(replace(layer, owner=changes.get(f"layer_{layer.layer}", layer.owner)) for layer in spec.layers)
    return replace(bundle.manifest, spec=replace(spec, layers=layers))


@pytest.mark.parametrize("changes", [{"layer_2": 2}, {"layer_2": 3}, {"layer_3": 2}, {"layer_2": 9}, {"layer_2": None}])
def test_a_manifest_whose_owners_are_not_the_graphs_is_refused(bundles, changes):
    with refused("E-BUNDLE-MANIFEST", InvalidBundle):
        Manifest.from_json(manifest_with(bundles(target="ort"), **changes).to_json())


def test_a_manifest_with_a_cache_after_layers_that_read_another_s_is_refused(bundles):
    with refused("E-BUNDLE-MANIFEST", InvalidBundle) as found:
        Manifest.from_json(manifest_with(bundles(target="ort"), layer_1=0, layer_2=None, layer_3=0).to_json())
    assert "comes after one that reads another's" in found.error.what


def test_a_manifest_with_another_owner_of_the_same_sizes_does_not_belong_to_its_checkpoint(bundles, checkpoints,
                                                                                          tmp_path):
    import shutil

    bundle = bundles(target="ort")
    shutil.copytree(bundle.folder, tmp_path / "b")
    (tmp_path / "b" / MANIFEST).write_text(manifest_with(bundle, layer_2=1).to_json())
    with refused("E-BUNDLE-FOREIGN", InvalidBundle) as found:
        gqa.open_bundle(tmp_path / "b").validate(checkpoints("gemma3n"), steps=1)
    assert "caches read" in found.error.what


def test_codes_and_long_prompts_are_refused(checkpoints, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A text. " * 40)
    with refused("E-MODEL-KV", UnsupportedModel):
        gqa.export(checkpoints("gemma3n"), tmp_path / "b", capacity=64, kv_cache="int8", calibrate=text)
    with refused("E-MODEL-LONG-SHARED", UnsupportedModel):
        gqa.export(checkpoints("gemma3n"), tmp_path / "b", capacity=64, long_attention=True)
    assert not (tmp_path / "b").exists()


def test_a_manifest_without_sharing_has_no_word_of_it(tmp_path):
    bundle = gqa.export(write_tiny("llama", tmp_path / "llama"), tmp_path / "b", capacity=64)
    assert "owner" not in (bundle.folder / MANIFEST).read_text()
    assert json.loads((bundle.folder / MANIFEST).read_text())["spec"]["layers"][0]["layer"] == 0


def test_readers_of_a_cache_come_in_the_order_of_their_layers_and_no_more_of_them(bundles):
    readers = CacheReaders(bundles(target="ort").manifest.spec)
    taken = [readers.take("past_key_values.0.key") for _ in range(3)]
    assert [layer.layer if layer else None for layer in taken] == [0, 2, None]
    assert readers.take("past_key_values.2.key") is None


def test_layers_that_read_one_cache_have_a_ring_only_if_they_see_as_far():
    def layer(number: int, window: int, owner: int | None = None) -> AttentionSpec:
        return AttentionSpec(number, 4, 2, 16, 16, 1.0, window=window, owner=owner)

    alike = [layer(0, 16), layer(1, 0), layer(2, 16, 0)]
    assert WindowCache.of(alike, 64, 8) == WindowCache(8, (0,))
    assert WindowCache.of(alike, 64, 8).slots(alike[2]) == 24
    assert WindowCache.of([*alike, layer(3, 32, 0)], 64, 8) is None
