"""Are attention's arguments understood or refused, never dropped? Is the wrapper the model, with its cache outside?"""

from __future__ import annotations

import gqa_models
import pytest
import torch
from refusal import refused

from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.errors import UnsupportedModel
from gqa_export.trace import attention_hook
from gqa_export.trace.capture import decoder_module
from gqa_export.trace.probe.layer_probe import probe
from gqa_export.trace.probe.mask_window import Visible, visible_of


def causal(batch, head, query, key):
    return key <= query


def tag(function):
    return attention_hook.MaskTag(function, False, None)


@pytest.mark.parametrize("width", [1, 2, 7, 16, 99])
def test_a_window_is_read_from_the_mask_alone(width):
    assert visible_of(tag(lambda b, h, q, k: (k <= q) & (k > q - width)), 0, 200, 4) == Visible(window=width)


def test_a_causal_mask_has_no_window():
    assert visible_of(tag(causal), 0, 200, 4) == Visible()


@pytest.mark.parametrize("size", [1, 2, 7, 16, 99, 199])
def test_the_size_of_chunks_is_read_from_the_mask_alone(size):
    mask = tag(lambda b, h, q, k: (k <= q) & (k // size == q // size))
    # chunks of one token are a window of one
    assert visible_of(mask, 0, 200, 4) == (Visible(chunk=size) if size > 1 else Visible(window=1))


@pytest.mark.parametrize("wrong", [
    lambda h, q, k: (q != 37) | (k != 33), lambda h, q, k: (h == 0) | (q != 37) | (k != 33),
    lambda h, q, k: q < 150], ids=["one hidden", "one hidden from one head", "nothing seen beyond"])
def test_a_mask_that_is_almost_one_of_chunks_is_refused(wrong):
    with refused("E-MODEL-MASK", UnsupportedModel):
        visible_of(tag(lambda b, h, q, k: (k <= q) & (k // 16 == q // 16) & wrong(h, q, k)), 0, 200, 4)


@pytest.mark.parametrize("function", [
    lambda b, h, q, k: k < q, lambda b, h, q, k: k >= 0, lambda b, h, q, k: (k <= q) & ((k + 3) // 8 == (q + 3) // 8),
    lambda b, h, q, k: (k <= q) | (k < 5), lambda b, h, q, k: (k <= q) & ((h == 0) | (k > q - 4)),
], ids=["strictly causal", "bidirectional", "a shorter first chunk", "prefix", "heads differ"])
def test_any_other_mask_is_refused(function):
    with refused("E-MODEL-MASK", UnsupportedModel) as refusal:
        visible_of(tag(function), 3, 64, 4)
    assert refusal.error.where == "layer 3"


@pytest.mark.parametrize(("function", "longest"), [
    (lambda b, h, q, k: (k <= q) & (k // 8 == q // 8), 8), (lambda b, h, q, k: (k <= q) & ((q != 300) | (k != 7)), 300),
    (lambda b, h, q, k: (k <= q) | ((q == 3) & (k == 290)), 290),
    (lambda b, h, q, k: (k <= q) & ((h == 0) | (q < 20)), 20),
], ids=["chunks", "one hidden", "one shown", "heads differ"])
def test_a_mask_that_is_another_beyond_some_position_is_causal_for_a_shorter_cache(function, longest):
    strange = tag(lambda b, h, q, k: function(b, h, q, k) & (q < 400))
    assert visible_of(strange, 0, 512, 4, capacity=longest) == Visible()
    with refused("E-MODEL-MASK", UnsupportedModel) as refusal:
        visible_of(strange, 0, 512, 4, capacity=longest + 1)
    assert f"--capacity {longest} or less" in refusal.error.fix


def test_a_layer_whose_mask_was_not_made_by_transformers_is_refused():
    with refused("E-MODEL-OWN-MASK", UnsupportedModel):
        visible_of(None, 2, 64, 4)


def test_an_unknown_attention_argument_is_refused_by_name():
    module = torch.nn.Module()
    module.layer_idx = 1
    query = torch.zeros(1, 2, 3, 4)
    with refused("E-MODEL-ATTENTION-ARGUMENT", UnsupportedModel) as refusal:
        attention_hook.attention(module, query, query, query, None, position_bias=torch.zeros(1))
    assert "`position_bias`" in refusal.error.what


def test_an_unknown_mask_argument_is_refused_by_name():
    known = {"allow_is_causal_skip": True, "dtype": torch.float32, "local_size": 4, "config": None}
    assert attention_hook.mask(1, 2, 3, mask_function=causal, new_switch=None, **known).gqa_mask.function is causal
    with refused("E-MODEL-MASK-ARGUMENT", UnsupportedModel) as refusal:
        attention_hook.mask(1, 2, 3, mask_function=causal, prefix_length=4, **known)
    assert "`prefix_length`" in refusal.error.what


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_the_wrapped_decoder_with_its_cache_outside_equals_the_model(tmp_path, name):
    checkpoint = open_checkpoint(gqa_models.write_tiny(name, tmp_path / name))
    reference = load_model(checkpoint, "float64")
    model = load_model(checkpoint, "float64", attn_implementation=attention_hook.register())
    spec = probe(model.config)
    decoder = decoder_module.Decoder(model, spec, cache="growing", logits="all", interface="mask")
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(3, spec.vocabulary, (2, 40), generator=generator)
    lengths, rows = torch.tensor([40, 23]), torch.arange(40)
    with torch.no_grad():
        first = [torch.zeros(2, layer.kv_num_heads, 0, size, dtype=torch.float64) for layer in spec.layers
                 for size in (layer.head_size, layer.value_head_size)]
        logits, *present = decoder(tokens, (rows < lengths[:, None]).long(), *first)
        step = torch.tensor([[7], [8]])
        mask = torch.cat([(rows < lengths[:, None]).long(), torch.ones(2, 1, dtype=torch.long)], 1)
        decoded, *_ = decoder(step, mask, *present)
        for b, length in enumerate(lengths.tolist()):
            whole = reference(input_ids=torch.cat([tokens[b, :length], step[b]])[None]).logits[0]
            # fp64 on both sides; attention's softmax inside eager models is fp32 by their own code.
            torch.testing.assert_close(logits[b, :length], whole[:-1], atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(decoded[b, 0], whole[-1], atol=2e-5, rtol=1e-5)


def test_left_padding_gives_nan_logits_for_that_row_alone(tmp_path):
    checkpoint = open_checkpoint(gqa_models.write_tiny("llama", tmp_path / "m"))
    model = load_model(checkpoint, attn_implementation=attention_hook.register())
    spec = probe(model.config)
    decoder = decoder_module.Decoder(model, spec, cache="growing", logits="all", interface="mask")
    empty = [torch.zeros(2, 2, 0, 16) for _ in range(2 * len(spec.layers))]
    with torch.no_grad():
        logits, *_ = decoder(torch.full((2, 3), 5), torch.tensor([[0, 1, 1], [1, 1, 0]]), *empty)
    assert logits[0].isnan().all()
    assert logits[1].isfinite().all()
