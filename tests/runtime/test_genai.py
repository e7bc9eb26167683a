"""An `ort` bundle in onnxruntime-genai, unchanged: same tokens, every end token honoured."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from refusal import refused

from gqa_export.bundle.manifest import read_manifest
from gqa_export.exporting.genai_config import FILE, genai_config, misfit
from gqa_export.runtime.generate import generate
from gqa_export.runtime.ort.session import OrtSession
from gqa_export.spec import Fallback
from gqa_export.targets import get_target

PROMPT = [5, 6, 7, 40, 41]


def through_genai(folder, count: int) -> list[int]:
    """Greedy tokens after PROMPT."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(PROMPT) + count)
    generator = og.Generator(model, params)
    generator.append_tokens(PROMPT)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(PROMPT):]


@pytest.mark.parametrize("cache", ["growing", "static"])
def test_genai_gives_the_tokens_that_our_own_loop_gives(bundle, cache) -> None:
    pytest.importorskip("onnxruntime_genai")
    folder = bundle("ort", cache)
    ours = generate(OrtSession.load(folder, "cpu"), [PROMPT], 30, read_manifest(folder).tokens["eos"]).tokens[0]
    assert through_genai(folder, 30) == ours
    assert len(ours) > 20


RAGGED = ([5, 6, 7, 40, 41], [9], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [300, 30, 3])


def through_engine(folder, prompts, count: int) -> list[list[int]]:
    """Greedy tokens of several requests that onnxruntime-genai's Engine runs as one batch."""
    import onnxruntime_genai as og

    engine = og.Engine(og.Model(str(folder)))
    events, found = engine.create_event_buffer(64), []
    for prompt in prompts:
        request = engine.create_request()
        options = og.TurnOptions(request)
        options.set_max_generated_tokens(count)
        options.set_do_sample(False)
        request.begin_turn(np.array(prompt, np.int32), options)
        found.append((request, []))
    for _ in range(20 * count):
        if not engine.has_pending_requests():
            break
        for event in engine.run(events):
            for request, tokens in found:
                if event.request == request and int(event.flags) & int(og.EngineEventFlags.TOKEN):
                    tokens.append(int(event.token))
    return [tokens for _, tokens in found]


@pytest.mark.parametrize("cache", ["growing", "static"])
def test_genai_s_engine_gives_every_row_of_a_ragged_batch_what_it_gets_alone(bundle, cache) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    if not hasattr(og, "Engine"):
        pytest.skip("onnxruntime-genai below 0.18 has another Engine")
    folder = bundle("ort", cache)
    alone = [generate(OrtSession.load(folder, "cpu"), [prompt], 12, []).tokens[0] for prompt in RAGGED]
    assert through_engine(folder, RAGGED, 12) == alone
    assert all(len(set(tokens)) > 1 for tokens in alone)


def test_genai_stops_at_any_of_several_end_tokens(copied) -> None:
    pytest.importorskip("onnxruntime_genai")
    free = generate(OrtSession.load(copied, "cpu"), [PROMPT], 30).tokens[0]
    end = free[12]
    manifest = read_manifest(copied)
    manifest = replace(manifest, tokens={**manifest.tokens, "eos": [319, end] if end != 319 else [318, end]})
    (copied / FILE).write_text(json.dumps(genai_config(manifest)))
    # it keeps the end token to itself
    assert through_genai(copied, 30) == free[: free.index(end)]


def test_the_configuration_says_what_the_manifest_says(bundle) -> None:
    manifest = read_manifest(bundle())
    config = genai_config(manifest)
    decoder = config["model"]["decoder"]
    assert (decoder["head_size"], decoder["num_key_value_heads"], decoder["num_hidden_layers"]) == (16, 2, 2)
    assert decoder["inputs"]["past_key_names"] % 1 == "past_key_values.1.key"
    assert decoder["outputs"]["present_value_names"] % 0 == "present.0.value"
    assert config["model"]["eos_token_id"] == manifest.tokens["eos"]
    assert config["model"]["context_length"] == config["search"]["max_length"] == manifest.capacity
    assert config["search"]["past_present_share_buffer"] is True
    assert json.loads((bundle() / FILE).read_text())["model"] == config["model"]


def test_a_graph_with_a_layer_that_fell_back_does_not_share_its_buffers(bundle) -> None:
    manifest = read_manifest(bundle())
    target = get_target(manifest.target)
    fallen = replace(manifest, fallbacks=(Fallback(1, target.attention, target.fallback, "for this test"),))
    assert genai_config(fallen)["search"]["past_present_share_buffer"] is False


@pytest.mark.parametrize(("change", "reason"), [
    ({"kv_num_heads": 1}, "layers differ"),
    ({"head_size": 8, "value_head_size": 8}, "layers differ"),
    ({"layer": 4}, "own no cache"),
])
def test_a_model_whose_layers_differ_is_no_model_for_genai(bundle, change, reason) -> None:
    manifest = read_manifest(bundle())
    first, second = manifest.spec.layers
    odd = replace(manifest, spec=replace(manifest.spec, layers=(first, replace(second, **change))))
    assert reason in misfit(odd)
    with refused("E-MODEL-GENAI"):
        genai_config(odd)


def test_keys_and_values_of_different_sizes_are_no_model_for_genai(bundle) -> None:
    manifest = read_manifest(bundle())
    layers = tuple(replace(layer, value_head_size=8) for layer in manifest.spec.layers)
    assert "sizes of keys and values" in misfit(replace(manifest, spec=replace(manifest.spec, layers=layers)))
    assert misfit(replace(manifest, spec=replace(manifest.spec, layers=()))) == "no layer owns a cache"
