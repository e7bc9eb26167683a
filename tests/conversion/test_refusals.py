"""What cannot be converted is said clearly, before anything is written."""

from __future__ import annotations

import errno
import json

import pytest

from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.conversion.convert import convert, expand
from gqa_export.conversion.options import ConvertOptions
from gqa_export.errors import GqaExportError


def refused(folder, tmp_path, **options) -> GqaExportError:
    """The refusal; nothing may be left beside the output."""
    output = tmp_path / "parent" / "out"
    with pytest.raises(GqaExportError) as caught:
        convert(open_checkpoint(folder), output, ConvertOptions(**options))
    assert not output.parent.exists() or list(output.parent.iterdir()) == []
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize(("kv_heads", "says"), [
    ("3", "3 key/value heads do not divide the model's 4"), ("8", "8 key/value heads are more than the model has (4)"),
    ("0", "do not divide"), ("two", "is no number"), ("2,2", "2 numbers of heads for 3 layers"),
    ("auto", "--kv-heads auto needs a limit"),
])
def test_numbers_that_cannot_be(kv_heads, says, tiny, tmp_path):
    error = refused(tiny("llama_mha"), tmp_path, kv_heads=kv_heads)
    assert says in error.what
    if kv_heads in "38":
        assert "1, 2, 4" in error.fix


def test_one_number_per_layer_needs_an_architecture_that_has_it(tiny, tmp_path):
    error = refused(tiny("llama_mha"), tmp_path, kv_heads="4,2,1")
    assert "one number of key/value heads for all its layers" in error.what


@pytest.mark.parametrize(("options", "says"), [
    ({"max_error": 0.5}, "belongs to --kv-heads auto"), ({"method": "calibrated"}, "has no text"),
    ({"method": "median"}, "unknown method"),
])
def test_options_that_contradict(options, says, tiny, tmp_path):
    assert says in refused(tiny("llama"), tmp_path, kv_heads="1", **options).what


@pytest.mark.parametrize(("content", "says"), [(None, "cannot read the text"), (b"", "empty"), (b" \n", "empty"),
                                               (b"\xff\xfe\x00", "not UTF-8")])
def test_texts_that_are_none(content, says, tiny, tmp_path):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert says in refused(tiny("llama"), tmp_path, kv_heads="1", method="calibrated", text=path).what


def test_no_tokenizer_for_the_text(tmp_path, text_file):
    import gqa_models

    folder = gqa_models.write_tiny("llama", tmp_path / "bare")
    error = refused(folder, tmp_path, kv_heads="1", method="calibrated", text=text_file)
    assert "no tokenizer" in error.what


@pytest.mark.parametrize(("name", "says"), [("deepseek_v3", "keys come from several linear layers"),
                                          ("gpt2", "cannot have 1 key/value heads")])
def test_architectures_whose_heads_cannot_be_pooled(name, says, tiny, tmp_path):
    with pytest.raises(GqaExportError) as caught:
        convert(open_checkpoint(tiny(name)), tmp_path / "out", ConvertOptions(kv_heads="1"))
    assert says in caught.value.what
    assert not (tmp_path / "out").exists()


def save(model_class: str, folder, **config):
    import torch
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, model_class.replace("ForCausalLM", "Config"))(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, **config)
    getattr(transformers, model_class)(made).save_pretrained(folder)
    return folder


def test_a_norm_over_all_heads_is_refused(tmp_path):
    error = refused(save("Olmo2ForCausalLM", tmp_path / "olmo2"), tmp_path, kv_heads="2")
    assert "norm over all heads" in error.what


def test_a_norm_with_weights_of_each_head_is_refused_by_name(tmp_path):
    error = refused(save("CohereForCausalLM", tmp_path / "cohere", use_qk_norm=True), tmp_path, kv_heads="2")
    assert "k_norm.weight depends on the number of key/value heads" in error.what


def test_layers_that_share_keys_and_values_are_refused(tmp_path):
    import transformers

    config = transformers.Gemma3nTextConfig(
        vocab_size=64, vocab_size_per_layer_input=64, hidden_size=32, hidden_size_per_layer_input=8,
        intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_kv_shared_layers=2, laurel_rank=4, altup_num_inputs=2, max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.0] * 4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma3n")
    error = refused(tmp_path / "gemma3n", tmp_path, kv_heads="1")
    assert error.what.endswith("the keys of this layer do not come from a linear layer of its own")
    assert error.where.startswith("layer 2")


def test_a_method_that_needs_the_output_projection_says_so_where_a_norm_hides_it(tmp_path):
    """BitNet has a norm between attention and its output projection: the mean works, likeness does not."""
    folder = save("BitNetForCausalLM", tmp_path / "bitnet")
    convert(open_checkpoint(folder), tmp_path / "mean", ConvertOptions(kv_heads="2"))
    error = refused(folder, tmp_path, kv_heads="2", grouping="similarity")
    assert "between attention and its output projection" in error.what


def test_quantized_weights_are_refused(tiny, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "int8"
    folder.mkdir()
    config = json.loads((tiny("llama") / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(tiny("llama") / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.ones(32, 64, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors")
    assert "quantized" in refused(folder, tmp_path, kv_heads="1").what
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(GqaExportError, match="quantized"):
        open_checkpoint(folder)


def test_config_and_weights_that_do_not_belong_together(tiny, tmp_path):
    import shutil

    folder = shutil.copytree(tiny("llama"), tmp_path / "mixed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 4}))
    assert "config.json asks for" in refused(folder, tmp_path, kv_heads="1").what


def test_weights_under_other_names(tiny, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny("llama"), tmp_path / "renamed")
    tensors = load_file(folder / "model.safetensors")
    save_file({name.replace("k_proj", "key"): value for name, value in tensors.items()}, folder / "model.safetensors")
    assert "stored under other names" in refused(folder, tmp_path, kv_heads="1").what


def test_infinite_weights_are_not_written_on(tiny, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny("llama"), tmp_path / "infinite")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    assert "cannot hold" in refused(folder, tmp_path, kv_heads="1").what


def test_auto_that_no_number_satisfies_names_the_best(tiny, tmp_path):
    error = refused(tiny("llama"), tmp_path, kv_heads="auto", max_error=0.01)
    assert "within 0.01; 1 heads come to" in error.what
    assert "nothing to convert" in refused(tiny("llama_mqa"), tmp_path, kv_heads="auto", max_error=1.0).fix


def test_gguf_is_refused(tmp_path):
    from gqa_export.checkpoint.checkpoint import Checkpoint

    checkpoint = Checkpoint("model.gguf", tmp_path, "gguf", tmp_path / "model.gguf", {})
    with pytest.raises(GqaExportError, match="GGUF"):
        convert(checkpoint, tmp_path / "out", ConvertOptions(kv_heads="1"))


def test_an_output_that_is_in_use_stays_as_it_is(tiny, tmp_path):
    folder = tiny("llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    for force, says in ((False, "not empty"), (True, "something else")):
        with pytest.raises(GqaExportError, match=says):
            convert(open_checkpoint(folder), tmp_path / "out", ConvertOptions(kv_heads="1", force=force))
    (tmp_path / "file").write_text("")
    with pytest.raises(GqaExportError, match="not a folder"):
        convert(open_checkpoint(folder), tmp_path / "file", ConvertOptions(kv_heads="1"))
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    convert(open_checkpoint(folder), tmp_path / "again", ConvertOptions(kv_heads="1", method="first"))
    convert(open_checkpoint(folder), tmp_path / "again", ConvertOptions(kv_heads="1", force=True))
    assert json.loads((tmp_path / "again" / "gqa_convert.json").read_text())["method"] == "mean"


@pytest.mark.parametrize(("number", "says"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "cannot write there")])
@pytest.mark.parametrize("method", ["mean", "calibrated"])
def test_a_disk_that_ends_or_refuses_leaves_nothing(method, number, says, tiny, tmp_path, text_file, monkeypatch):
    def write(*_):
        raise OSError(number, "no")

    monkeypatch.setattr("gqa_export.conversion.checkpoint_writer.write_safetensors", write)
    error = refused(tiny("llama", num_hidden_layers=1), tmp_path, kv_heads="1", method=method, text=text_file)
    assert says in error.what


def test_expanding_to_a_number_that_is_no_multiple_is_refused(tiny, tmp_path):
    with pytest.raises(GqaExportError, match="no multiple"):
        expand(open_checkpoint(tiny("llama")), tmp_path / "out", 3)
