"""`calibrated`: fitted to what the layers do on a text."""

from __future__ import annotations

import pytest
import torch

from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.conversion.convert import convert, expand
from gqa_export.conversion.options import ConvertOptions

pytestmark = pytest.mark.whole_model


def options(text_file, **more) -> ConvertOptions:
    return ConvertOptions(method="calibrated", text=text_file, tokens=1024, **more)


def hidden_error(folder, other, text_file) -> float:
    """Relative difference of the last hidden states on a part of the text that calibration did not see."""
    from gqa_export.checkpoint.tokenized_text import load_tokenizer, tokenize

    ids = tokenize(load_tokenizer(folder), text_file.read_text())[301:701]
    rows = torch.from_numpy(ids.astype("int64")).reshape(4, 100)
    with torch.no_grad():
        states = [load_model(open_checkpoint(place), "fp32").base_model(rows).last_hidden_state
                  for place in (folder, other)]
    return float((states[1] - states[0]).norm() / states[0].norm())


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_it_is_nearer_to_the_source_on_text_than_the_fit_of_weights(name, tiny, tmp_path, text_file):
    folder = tiny(name)
    fitted = convert(open_checkpoint(folder), tmp_path / "calibrated", options(text_file, kv_heads="1"))
    convert(open_checkpoint(folder), tmp_path / "svd", ConvertOptions(kv_heads="1", method="svd"))
    assert {layer.basis for layer in fitted.layers} == {"activations"}
    near, far = (hidden_error(folder, tmp_path / name, text_file) for name in ("calibrated", "svd"))
    assert near < 0.9 * far


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt_bigcode", "cohere"])
def test_groups_of_equal_heads_lose_nothing(name, tiny, tmp_path, text_file, logits):
    """Windows, softcap, sinks, a packed projection with another layout: attention here is the model's own. The fitted
    output projection differs by rounding in fp32, hence 1e-3 of the logits."""
    if name == "gpt_bigcode":
        import transformers
        from small_text import byte_tokenizer

        folder = tmp_path / "mqa"
        config = transformers.GPTBigCodeConfig(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=128)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        byte_tokenizer(folder)
    else:
        folder = tiny(name, num_hidden_layers=2)
    expand(open_checkpoint(folder), tmp_path / "mha", 4)
    kv_heads = "1" if name == "gpt_bigcode" else "2"
    result = convert(open_checkpoint(tmp_path / "mha"), tmp_path / "back", options(text_file, kv_heads=kv_heads))
    assert max(layer.output for layer in result.layers) < 1e-3
    expected = logits(folder)
    assert (logits(tmp_path / "back") - expected).abs().max() < 1e-3 * float(expected.abs().max())


def test_heads_are_matched_by_what_they_do_on_the_text(tiny, tmp_path, text_file):
    expand(open_checkpoint(tiny("llama")), tmp_path / "mha", 4, [3, 1, 0, 2])
    result = convert(open_checkpoint(tmp_path / "mha"), tmp_path / "back",
                     options(text_file, kv_heads="2", grouping="similarity"))
    assert set(result.groups) == {((0, 3), (1, 2))}
    assert max(layer.output for layer in result.layers) < 1e-3


def test_it_keeps_the_stored_type_and_reads_a_bf16_checkpoint_without_widening_it(tiny, tmp_path, text_file):
    folder = tiny("llama", "bfloat16")
    convert(open_checkpoint(folder), tmp_path / "mqa", options(text_file, kv_heads="1"))
    assert {tensor.dtype for tensor in open_checkpoint(tmp_path / "mqa").tensors.values()} == {"bfloat16"}
    assert sorted(path.name for path in (tmp_path / "mqa").iterdir() if path.name.startswith(".")) == []
    convert(open_checkpoint(tiny("llama")), tmp_path / "wide", options(text_file, kv_heads="1"))
    near, far = (hidden_error(folder, tmp_path / name, text_file) for name in ("mqa", "wide"))
    assert near == pytest.approx(far, abs=0.05)  # the bf16 model differs from the fp32 one by a percent


def test_auto_measures_activations(tiny, tmp_path, text_file):
    folder = tiny("llama_mha", num_hidden_layers=2)
    result = convert(open_checkpoint(folder), tmp_path / "auto",
                     options(text_file, kv_heads="auto", max_error=0.95))
    assert set(result.kv_heads) == {1}
    assert max(layer.output for layer in result.layers) <= 0.95
