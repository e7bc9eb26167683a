"""A model compared with itself passes; broken in one place, it is caught, and the place is named."""

from __future__ import annotations

import pytest
import torch

from .conftest import mutated, torch_verdict

pytestmark = pytest.mark.whole_model


def layers(model):
    return model.model.layers


def scale(model):
    layers(model)[1].self_attn.scaling *= 1.001


def window_dropped(model):
    for layer in layers(model):
        layer.self_attn.sliding_window = None
    model.config.sliding_window = None


def window_one_longer(model):
    model.config.sliding_window += 1


def window_one_shorter(model):
    model.config.sliding_window -= 1


def key_value_heads_swapped(model):
    for projection in (layers(model)[1].self_attn.k_proj, layers(model)[1].self_attn.v_proj):
        size = projection.weight.shape[0] // 2
        projection.weight.data = torch.roll(projection.weight.data, size, 0)


def theta(model):
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq * 1.01
    if hasattr(rotary, "original_inv_freq"):
        rotary.original_inv_freq = rotary.inv_freq


def one_weight_row(model):
    layers(model)[2].self_attn.o_proj.weight.data[5] *= 1.01


def layers_exchanged(model):
    first, second = layers(model)[0], layers(model)[1]
    first.mlp, second.mlp = second.mlp, first.mlp


def softcap_dropped(model):
    for layer in layers(model):
        layer.self_attn.attn_logit_softcapping = None


def sinks_zeroed(model):
    for layer in layers(model):
        layer.self_attn.sinks.data.zero_()


def norm_weight(model):
    layers(model)[0].input_layernorm.weight.data[3] += 0.01


def final_logits(model):
    model.lm_head.weight.data[77] *= 1.01


# kind of damage, models it applies to, the output where it must first show
DAMAGE = [
    (scale, "llama", "layer 2 key"),
    (window_dropped, "mistral", "layer 1 key"),
    (window_one_longer, "mistral", "layer 1 key"),
    (window_one_shorter, "mistral", "layer 1 key"),
    (key_value_heads_swapped, "llama", "layer 1 key"),
    (key_value_heads_swapped, "qwen3", "layer 1 key"),
    (theta, "llama", "layer 0 key"),
    (one_weight_row, "llama", "logits"),
    (layers_exchanged, "llama", "layer 1 key"),
    (softcap_dropped, "gemma2", "layer 1 key"),
    (sinks_zeroed, "gpt_oss", "layer 1 key"),
    (norm_weight, "llama", "layer 0 key"),
    (final_logits, "llama", "logits"),
]


@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_pytorch_passes_against_itself(tiny, name):
    verdict = torch_verdict(tiny(name), tiny(name), steps=32)
    assert verdict.passed, str(verdict.first)
    assert verdict.max_abs_logits_eager == 0


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_an_equivalent_model_in_another_order_of_summation_passes(tiny, name):
    """Hidden units of every MLP permuted: the same function, another order of rounding."""
    def permute(model):
        for layer in layers(model):
            order = torch.randperm(layer.mlp.up_proj.weight.shape[0], generator=torch.Generator().manual_seed(3))
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                projection.weight.data = projection.weight.data[order].clone()
            layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, order].clone()

    verdict = torch_verdict(tiny(name), mutated(tiny(name), permute))
    assert verdict.passed, str(verdict.first)
    assert verdict.max_abs_logits_eager > 0


@pytest.mark.parametrize(("change", "name", "place"), DAMAGE, ids=[f"{c.__name__}-{n}" for c, n, _ in DAMAGE])
def test_damage_is_caught_and_its_first_effect_is_named(tiny, change, name, place):
    verdict = torch_verdict(tiny(name), mutated(tiny(name), change))
    assert not verdict.passed
    assert verdict.first.output == place, str(verdict.first)


def test_a_dropped_window_first_shows_at_the_first_token_past_it(tiny):
    model = tiny("mistral")
    verdict = torch_verdict(model, mutated(model, window_dropped))
    assert verdict.first.axes["token"] == model.config.sliding_window


def test_half_precision_widens_the_bound_and_passes_what_is_the_same(tiny):
    same = torch_verdict(tiny("llama"), tiny("llama"), dtype="float16")
    assert same.passed, str(same.first)


@pytest.mark.parametrize("change", [scale, theta, key_value_heads_swapped, one_weight_row])
def test_half_precision_still_catches(tiny, change):
    def strongly(model):
        for _ in range(100 if change in (scale, theta, one_weight_row) else 1):
            change(model)

    model = tiny("llama")
    assert not torch_verdict(model, mutated(model, strongly), dtype="float16").passed


def test_a_bundle_with_only_the_last_logits_is_still_caught(tiny):
    verdict = torch_verdict(tiny("llama"), mutated(tiny("llama"), final_logits), last_only=True)
    assert not verdict.passed
    assert verdict.first.output == "logits"
