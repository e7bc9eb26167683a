"""Are patches in place only while a model is traced, only on the code they were written for, and undone after?"""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from gqa_models.shrink import small_config, write_small
from refusal import refused

from gqa_export.checkpoint.load_config import load_config
from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.errors import InvalidCheckpoint, UnsupportedModel
from gqa_export.trace import attention_hook
from gqa_export.trace.capture import decoder_module
from gqa_export.trace.patches import alibi, experts, registry
from gqa_export.trace.probe import layer_probe, mask_window


def found_digest(place: str) -> str:
    module, _, path = place.partition(":")
    found = importlib.import_module(f"transformers.models.{module}")
    for part in path.split("."):
        found = inspect.getattr_static(found, part, None)
    return registry.ABSENT if found is None else registry.digest(found)


FUNCTIONS = [patch.place for patch in registry.registry() if not patch.path.endswith("]")]


@pytest.mark.parametrize("place", FUNCTIONS)
def test_a_patched_function_is_one_that_the_patch_was_held_against(place):
    assert found_digest(place) in registry.SEEN[place], (
        "transformers changed this function: read it, adapt the patch, then run scripts/patch_digests.py")


def test_every_digest_belongs_to_a_patch():
    assert set(registry.SEEN) == set(FUNCTIONS)


def test_a_patch_is_in_place_inside_and_gone_after_even_if_the_trace_fails():
    from transformers.models.gpt_neo import modeling_gpt_neo as module

    before = module.GPTNeoSelfAttention._attn

    def trace_that_fails():
        with registry.applied(small_config("gpt_neo")) as inside:
            assert {patch.path for patch in inside} == {"GPTNeoSelfAttention._attn",
                                                        "GPT_NEO_ATTENTION_CLASSES[gqa_export]"}
            assert module.GPTNeoSelfAttention._attn is not before
            with registry.applied(small_config("gpt_neo")):
                pass
            assert module.GPTNeoSelfAttention._attn is not before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trace_that_fails()
    assert module.GPTNeoSelfAttention._attn is before
    assert attention_hook.NAME not in module.GPT_NEO_ATTENTION_CLASSES


def test_a_place_that_does_not_exist_is_passed_over_only_if_a_version_without_it_was_read(monkeypatch):
    from transformers.models.gpt_neo import modeling_gpt_neo as module

    place = "gpt_neo.modeling_gpt_neo:GPTNeoSelfAttention._attn"
    monkeypatch.delattr(module.GPTNeoSelfAttention, "_attn")
    with refused("E-MODEL-PATCH-STALE", UnsupportedModel), registry.applied(small_config("gpt_neo")):
        pass
    monkeypatch.setitem(registry.SEEN, place, (*registry.SEEN[place], registry.ABSENT))
    with registry.applied(small_config("gpt_neo")):
        assert not hasattr(module.GPTNeoSelfAttention, "_attn")
    assert not hasattr(module.GPTNeoSelfAttention, "_attn")


def test_a_model_without_patches_gets_none():
    with registry.applied(small_config("llama")) as inside:
        assert inside == ()


def test_other_code_in_transformers_is_refused(monkeypatch):
    place = "falcon.modeling_falcon:FalconAttention.forward"
    monkeypatch.setitem(registry.SEEN, place, ("0" * 12,))
    with refused("E-MODEL-PATCH-STALE", UnsupportedModel) as refusal, registry.applied(small_config("falcon")):
        pass
    assert "FalconAttention.forward" in refusal.error.what


def test_falcon_whose_number_of_key_heads_contradicts_its_projection_is_refused():
    config = small_config("falcon", new_decoder_architecture=False, multi_query=False, num_kv_heads=2)
    with refused("E-MODEL-KV-HEADS", InvalidCheckpoint), registry.applied(config):
        layer_probe.probe(config)


def test_falcon_with_alibi_is_refused_by_name():
    with refused("E-MODEL-ALIBI", UnsupportedModel):
        layer_probe.probe(small_config("falcon", alibi=True))


REWORDED = ("bloom", "mpt", "dbrx", "jetmoe", "longcat_flash", "diffllama", "deepseek_v2", "gemma3n_text",
            "gemma4_text")


@pytest.mark.parametrize("name", REWORDED)
def test_a_patched_model_with_a_cache_of_its_own_computes_what_transformers_does(name, tmp_path):
    checkpoint = open_checkpoint(write_small(name, tmp_path / name))
    config, ids = load_config(checkpoint), torch.randint(5, 300, (1, 37), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        whole = load_model(checkpoint, "float64")(input_ids=ids).logits
        baseline = load_model(checkpoint, "float32")(input_ids=ids).logits
    with registry.applied(config), torch.no_grad():
        spec = layer_probe.probe(config)
        model = load_model(checkpoint, "float32", attn_implementation=attention_hook.register())
        decoder = decoder_module.Decoder(model, spec, cache="growing", logits="all", interface="mask")
        past = [torch.zeros(1, layer.kv_num_heads, 0, size) for layer in spec.layers
                for size in (layer.head_size, layer.value_head_size)]
        first, *past = decoder(ids[:, :30], torch.ones_like(ids[:, :30]), *past)  # longer than the window
        second, *_ = decoder(ids[:, 30:], torch.ones_like(ids), *past)
    # no further from fp64 than transformers' own fp32 is, twice over: the sums run in another order
    difference = (torch.cat([first, second], dim=1) - whole).abs().max()
    assert difference <= 8 * (baseline - whole).abs().max()


def test_alibi_is_carried_exactly_by_two_features_even_in_bf16():
    positions = torch.tensor([[0, 1, 255, 256, 257, 4097, 65535]])
    slopes, scale = torch.tensor([0.5, 0.0625]), 0.25
    query = key = torch.zeros(1, 2, positions.shape[1], 8, dtype=torch.bfloat16)
    with attention_hook.recording(None, positions):
        query, key = alibi.carried(query, key, slopes, scale)
    scores = scale * query.double() @ key.double().transpose(-1, -2)
    assert torch.equal(scores[0, :, 0], slopes.double()[:, None] * positions[0].double())


def test_experts_picked_by_index_are_the_experts_of_a_loop():
    generator = torch.Generator().manual_seed(7)
    states, weights = torch.randn(6, 5, generator=generator), torch.randn(4, 3, 5, generator=generator)
    index = torch.tensor([[0, 3], [1, 2], [3, 3], [2, 0], [1, 1], [0, 1]])
    picked = experts.chosen(states, weights, index)
    for token, row in enumerate(index.tolist()):
        for place, expert in enumerate(row):
            torch.testing.assert_close(picked[token, place], weights[expert] @ states[token])


def test_a_window_beside_the_mask_narrows_it():
    tagged = torch.zeros(1, 1, 1, 1)
    tagged.gqa_mask = attention_hook.MaskTag(lambda b, h, q, k: k <= q, False, None)
    narrow = attention_hook.windowed(tagged, 7)
    assert mask_window.visible_of(narrow.gqa_mask, 0, 64, 4).window == 7
    assert attention_hook.windowed(tagged, 0) is tagged
    assert attention_hook.windowed(None, 7) is None


def test_positions_are_needed_only_where_they_are_given():
    with attention_hook.recording(None), refused("E-MODEL-POSITIONS"):
        attention_hook.positions()
