"""Does the probe read what layers really do, and refuse by name what grouped attention cannot hold?"""

from __future__ import annotations

import gqa_models
import pytest
from refusal import refused

from gqa_export.errors import UnsupportedModel
from gqa_export.trace.probe import layer_probe
from gqa_export.trace.probe.layer_probe import probe


@pytest.fixture
def config_of(tmp_path):
    """The transformers config of a tiny model."""
    def load(name, **overrides):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(gqa_models.write_tiny(name, tmp_path / name, **overrides))

    return load


@pytest.mark.parametrize(("name", "windows", "softcap", "sinks"), [
    ("llama", {0}, 0.0, False), ("mistral", {16}, 0.0, False), ("gemma2", {0, 16}, 4.0, False),
    ("gemma3", {0, 16}, 0.0, False), ("gpt_oss", {0, 16}, 0.0, True)])
def test_layer_facts_are_those_that_attention_is_called_with(config_of, name, windows, softcap, sinks):
    spec = probe(config_of(name))
    assert {layer.window for layer in spec.layers} == windows
    assert {layer.softcap for layer in spec.layers} == {softcap}
    assert {layer.sinks for layer in spec.layers} == {sinks}


def test_heads_that_are_not_hidden_size_over_heads_are_read_from_the_call(config_of):
    config = config_of("qwen3")
    layer = probe(config).layers[0]
    assert layer.head_size == config.head_dim != config.hidden_size // config.num_attention_heads


def test_a_window_that_is_only_in_the_mask_is_honoured(config_of):
    config = config_of("phimoe")
    assert {layer.window for layer in probe(config).layers} == {config.sliding_window}


@pytest.mark.parametrize(("name", "code", "named"), [
    ("gemma3_bidirectional", "E-MODEL-MASK", "_bidirectional_window_overlay"),
    ])
def test_what_grouped_attention_cannot_hold_is_refused_by_name(config_of, name, code, named):
    with refused(code, UnsupportedModel) as refusal:
        probe(config_of(name))
    assert named in refusal.error.what


def test_layers_that_do_not_look_at_other_tokens_are_not_said_to_hide_their_attention():
    from gqa_models.shrink import small_config

    with refused("E-MODEL-NO-ATTENTION", UnsupportedModel) as refusal:
        probe(small_config("nemotron_h", num_hidden_layers=1, layers_block_type=["mlp"]))
    assert "no layer of this model has attention" in refusal.error.what


@pytest.mark.parametrize(("owners", "supported"), [((None, 0, None), False), ((None, 0, 0), True)])
def test_a_layer_with_keys_of_its_own_after_one_that_reads_another_s_is_refused(config_of, monkeypatch, owners,
                                                                               supported):
    """Sessions count on all caches being those of the first layers, in their order."""
    monkeypatch.setattr(layer_probe, "owner_of", lambda call, calls: owners[call.layer])
    config = config_of("llama", num_hidden_layers=3)
    if supported:
        assert tuple(layer.owner for layer in probe(config).layers) == owners
        return
    with refused("E-MODEL-SHARED-ORDER", UnsupportedModel) as refusal:
        probe(config)
    assert "layer 1 reads the keys and values of layer 0, and layer 2 after it has its own" in refusal.error.what


def test_chunks_of_attention_are_a_fact_of_a_layer_and_of_no_layer_where_the_cache_ends_within_the_first(config_of):
    config = config_of("llama4")
    assert config.attention_chunk_size == 4
    assert {(layer.window, layer.chunk) for layer in probe(config, capacity=4).layers} == {(0, 0)}
    for capacity in (0, 5):
        assert [layer.chunk for layer in probe(config, capacity=capacity).layers] == [4, 4, 4, 0]
        assert {layer.window for layer in probe(config, capacity=capacity).layers} == {0}


def test_bert_is_exportable_as_a_decoder_and_refused_as_an_encoder(config_of):
    assert {layer.window for layer in probe(config_of("bert")).layers} == {0}
    with refused("E-MODEL-MASK", UnsupportedModel) as refusal:
        probe(config_of("bert", is_decoder=False))
    assert "bidirectional_mask_function" in refusal.error.what


def test_an_unknown_rotary_type_is_refused(config_of):
    config = config_of("llama")
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1e4}
    with refused("E-MODEL-ROPE-UNKNOWN", UnsupportedModel) as refusal:
        probe(config)
    assert "`spiral`" in refusal.error.what


def test_a_hybrid_whose_layers_all_have_attention_keeps_no_states():
    """Dense Granite 4: its mask for recurrent layers looks at values, of which the probe has none."""
    from gqa_models.shrink import small_config

    dense = probe(small_config("granitemoehybrid", layer_types=["attention"] * 5, num_local_experts=0))
    assert (len(dense.layers), dense.states) == (5, ())
