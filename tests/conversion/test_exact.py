"""What must be exact: repeated heads pooled again, heads that were moved found again, files as they were."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.conversion.convert import convert, expand
from gqa_export.conversion.options import ConvertOptions

pytestmark = pytest.mark.whole_model

FAMILIES = ["llama", "qwen2", "phi3", "gpt_oss", "gemma2", "cohere"]
"""separate and packed projections, biases, sinks, windows, interleaved rotary"""


def weights(folder):
    return load_file(folder / "model.safetensors")


def heads_of(folder) -> tuple[int, int]:
    config = json.loads((folder / "config.json").read_text())
    return config["num_attention_heads"], config["num_key_value_heads"]


@pytest.mark.parametrize(("name", "dtype"), [*((name, "bfloat16") for name in FAMILIES), ("llama", "float32")])
def test_repeated_heads_pooled_again_are_the_original_bit_for_bit(name, dtype, tiny, tmp_path):
    folder = tiny(name, dtype)
    heads, kv_heads = heads_of(folder)
    expand(open_checkpoint(folder), tmp_path / "mha", heads)
    result = convert(open_checkpoint(tmp_path / "mha"), tmp_path / "back", ConvertOptions(kv_heads=str(kv_heads)))
    before, after = weights(folder), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert {layer.output for layer in result.layers} == {0.0}
    assert result.cache_bytes_before == result.cache_bytes * heads // kv_heads


@pytest.mark.parametrize("name", FAMILIES)
def test_an_expanded_model_computes_the_same(name, tiny, tmp_path, logits):
    """The same numbers enter each sum in the same order: no tolerance."""
    folder = tiny(name)
    expand(open_checkpoint(folder), tmp_path / "mha", heads_of(folder)[0])
    assert heads_of(tmp_path / "mha")[1] == heads_of(folder)[0]
    assert torch.equal(logits(tmp_path / "mha"), logits(folder))


@pytest.mark.parametrize(("name", "method"), [("llama", "svd"), ("phi3", "mean"), ("gpt_oss", "svd"),
                                              ("qwen3", "mean")])
def test_moved_heads_are_found_again_by_their_likeness(name, method, tiny, tmp_path, logits):
    """Sums run over heads in another order, hence a few ulps of the largest logit."""
    folder = tiny(name)
    order = [2, 0, 3, 1]  # copies 0, 1 are of head 0; 2, 3 of head 1
    expand(open_checkpoint(folder), tmp_path / "mha", 4, order)
    result = convert(open_checkpoint(tmp_path / "mha"), tmp_path / "back",
                     ConvertOptions(kv_heads="2", method=method, grouping="similarity"))
    assert set(result.groups) == {((0, 2), (1, 3))}
    assert {layer.output for layer in result.layers} == {0.0}
    expected = logits(folder)
    assert (logits(tmp_path / "back") - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


def test_neighbours_of_moved_heads_are_no_group(tiny, tmp_path, logits):
    folder = tiny("llama")
    expand(open_checkpoint(folder), tmp_path / "mha", 4, [2, 0, 3, 1])
    convert(open_checkpoint(tmp_path / "mha"), tmp_path / "back", ConvertOptions(kv_heads="2"))
    assert (logits(tmp_path / "back") - logits(folder)).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "phi3", "stablelm", "smollm3", "gpt_oss"])
def test_a_group_of_one_changes_nothing_by_any_method_that_fits(name, tiny, tmp_path, logits):
    """K as it is: every fit is exact up to rounding. Partial rotary, a layer without rotary, biases."""
    folder = tiny(name)
    result = convert(open_checkpoint(folder), tmp_path / "same", ConvertOptions(kv_heads="2", method="svd",
                                                                                grouping="similarity"))
    assert max(max(layer.key, layer.value, layer.output or 0) for layer in result.layers) < 1e-7
    expected = logits(folder)
    assert (logits(tmp_path / "same") - expected).abs().max() < 1e-4 * float(expected.abs().max())


def test_the_output_is_a_checkpoint_with_the_files_of_the_source(tiny, tmp_path):
    folder = tiny("llama")
    convert(open_checkpoint(folder), tmp_path / "mqa", ConvertOptions(kv_heads="1"))
    names = {path.name for path in tmp_path.joinpath("mqa").iterdir()}
    assert names == {path.name for path in folder.iterdir()} | {"gqa_convert.json"}
    config, before = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "mqa", folder))
    assert {key for key in config if config[key] != before[key]} == {"num_key_value_heads"}
    untouched = {key for key in weights(folder) if "k_proj" not in key and "v_proj" not in key}
    after = weights(tmp_path / "mqa")
    assert all(torch.equal(weights(folder)[key], after[key]) for key in untouched)


def test_shards_stay_shards(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tiny("llama")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    shards = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    convert(open_checkpoint(tmp_path / "sharded"), tmp_path / "mqa", ConvertOptions(kv_heads="1", method="svd"))
    assert sorted(path.name for path in (tmp_path / "mqa").glob("*.safetensors")) == shards
    convert(open_checkpoint(folder), tmp_path / "whole", ConvertOptions(kv_heads="1", method="svd"))
    expected = weights(tmp_path / "whole")
    found = {key: value for shard in shards for key, value in load_file(tmp_path / "mqa" / shard).items()}
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_gpt_bigcode_goes_from_mha_to_mqa(tmp_path, logits):
    """Its packed projection changes its layout: per head query, key, value; then all queries, one key, one value."""
    import transformers

    config = transformers.GPTBigCodeConfig(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=128,
                                           multi_query=False)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mha")
    convert(open_checkpoint(tmp_path / "mha"), tmp_path / "mqa", ConvertOptions(kv_heads="1"))
    expand(open_checkpoint(tmp_path / "mqa"), tmp_path / "again", 4)
    assert json.loads((tmp_path / "mqa" / "config.json").read_text())["multi_query"] is True
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "mqa"))
    old, new = (weights(tmp_path / name)["transformer.h.0.attn.c_attn.weight"] for name in ("mha", "mqa"))
    packed = old.reshape(4, 3, 16, 64).double()
    assert torch.equal(new[:64], packed[:, 0].reshape(64, 64).float())
    assert torch.equal(new[64:80], packed[:, 1].mean(0).float())
    assert torch.equal(new[80:], packed[:, 2].mean(0).float())
