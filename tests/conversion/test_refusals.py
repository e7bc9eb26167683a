"""What cannot be converted is refused with a code and a fix, before anything is written."""

from __future__ import annotations

import errno
import json

import pytest
from gqa_models import save_random
from gqa_models.shrink import small_config
from refusal import refused

from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.conversion.convert import convert, expand
from gqa_export.conversion.options import ConvertOptions
from gqa_export.errors import GqaExportError, InvalidCheckpoint, UnsupportedModel


def refusal_of(folder, tmp_path, code, kind=GqaExportError, **options) -> GqaExportError:
    """The refusal; nothing may be left beside the output."""
    output = tmp_path / "parent" / "out"
    with refused(code, kind) as refusal:
        convert(open_checkpoint(folder), output, ConvertOptions(**options))
    assert not output.parent.exists() or list(output.parent.iterdir()) == []
    assert refusal.error.fix
    return refusal.error


@pytest.mark.parametrize(("kv_heads", "cause"), [
    ("3", "NOT-A-DIVISOR"), ("8", "TOO-MANY-HEADS"), ("0", "NOT-A-DIVISOR"), ("two", "NOT-A-NUMBER"),
    ("2,2", "LAYER-COUNT"), ("auto", "NO-LIMIT"),
])
def test_numbers_that_cannot_be(kv_heads, cause, tiny, tmp_path):
    error = refusal_of(tiny("llama_mha"), tmp_path, f"E-CONVERT-{cause}", kv_heads=kv_heads)
    if kv_heads in "38":
        assert "1, 2, 4" in error.fix


def test_one_number_per_layer_needs_an_architecture_that_has_it(tiny, tmp_path):
    refusal_of(tiny("llama_mha"), tmp_path, "E-CONVERT-PER-LAYER", UnsupportedModel, kv_heads="4,2,1")


@pytest.mark.parametrize(("options", "cause"), [
    ({"max_error": 0.5}, "LIMIT-UNUSED"), ({"method": "calibrated"}, "NO-TEXT"), ({"method": "median"}, "METHOD"),
])
def test_options_that_contradict(options, cause, tiny, tmp_path):
    refusal_of(tiny("llama"), tmp_path, f"E-CONVERT-{cause}", kv_heads="1", **options)


@pytest.mark.parametrize(("content", "cause"), [(None, "UNREADABLE"), (b"", "EMPTY"), (b" \n", "EMPTY"),
                                                (b"\xff\xfe\x00", "ENCODING")])
def test_texts_that_cannot_be_used(content, cause, tiny, tmp_path):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    error = refusal_of(tiny("llama"), tmp_path, f"E-FILE-TEXT-{cause}", kv_heads="1", method="calibrated", text=path)
    assert str(path) in error.where


def test_no_tokenizer_for_the_text(tmp_path, text_file):
    import gqa_models

    folder = gqa_models.write_tiny("llama", tmp_path / "bare")
    refusal_of(folder, tmp_path, "E-CKPT-TOKENIZER", InvalidCheckpoint, kv_heads="1", method="calibrated",
               text=text_file)


@pytest.mark.parametrize(("name", "code", "reason"), [
    ("deepseek_v3", "E-CONVERT-LAYOUT", "several linear layers"), ("gpt2", "E-CONVERT-KV-HEADS", "1 key/value heads")])
def test_architectures_whose_heads_cannot_be_pooled(name, code, reason, tiny, tmp_path):
    with refused(code, UnsupportedModel) as refusal:
        convert(open_checkpoint(tiny(name)), tmp_path / "out", ConvertOptions(kv_heads="1"))
    assert reason in refusal.error.what
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
    error = refusal_of(save("Olmo2ForCausalLM", tmp_path / "olmo2"), tmp_path, "E-CONVERT-LAYOUT", kv_heads="2")
    assert "norm over all heads" in error.what


def test_a_norm_with_weights_of_each_head_is_refused_by_name(tmp_path):
    folder = save("CohereForCausalLM", tmp_path / "cohere", use_qk_norm=True)
    error = refusal_of(folder, tmp_path, "E-CONVERT-OTHER-WEIGHTS", UnsupportedModel, kv_heads="2")
    assert error.where.endswith("k_norm.weight")


def test_layers_that_share_keys_and_values_are_refused(tmp_path):
    import transformers

    config = transformers.Gemma3nTextConfig(
        vocab_size=64, vocab_size_per_layer_input=64, hidden_size=32, hidden_size_per_layer_input=8,
        intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_kv_shared_layers=2, laurel_rank=4, altup_num_inputs=2, max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.0] * 4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma3n")
    error = refusal_of(tmp_path / "gemma3n", tmp_path, "E-CONVERT-LAYOUT", kv_heads="1")
    assert error.what.endswith("the keys of this layer do not come from a linear layer of its own")
    assert error.where.startswith("layer 2")


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5_text", "bamba"])
def test_models_with_states_beside_attention_are_refused_for_their_states(name, tmp_path):
    save_random(small_config(name), tmp_path / "checkpoint")
    error = refusal_of(tmp_path / "checkpoint", tmp_path, "E-CONVERT-STATES", UnsupportedModel, kv_heads="1")
    assert "layers 0" in error.where or "layers 1" in error.where


def test_a_method_that_needs_the_output_projection_says_so_where_a_norm_hides_it(tmp_path):
    """BitNet has a norm between attention and its output projection: the mean works, likeness does not."""
    folder = save("BitNetForCausalLM", tmp_path / "bitnet")
    convert(open_checkpoint(folder), tmp_path / "mean", ConvertOptions(kv_heads="2"))
    refusal_of(folder, tmp_path, "E-CONVERT-NO-OUTPUT", UnsupportedModel, kv_heads="2", grouping="similarity")


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
    refusal_of(folder, tmp_path, "E-MODEL-QUANTIZED", UnsupportedModel, kv_heads="1")
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with refused("E-MODEL-QUANTIZED", UnsupportedModel):
        open_checkpoint(folder)


def test_config_and_weights_that_do_not_belong_together(tiny, tmp_path):
    import shutil

    folder = shutil.copytree(tiny("llama"), tmp_path / "mixed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 4}))
    refusal_of(folder, tmp_path, "E-CKPT-TENSORS-SHAPE", InvalidCheckpoint, kv_heads="1")


def test_weights_under_other_names(tiny, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny("llama"), tmp_path / "renamed")
    tensors = load_file(folder / "model.safetensors")
    save_file({name.replace("k_proj", "key"): value for name, value in tensors.items()}, folder / "model.safetensors")
    refusal_of(folder, tmp_path, "E-CONVERT-TENSORS-MISSING", InvalidCheckpoint, kv_heads="1")


def test_infinite_weights_are_not_written_on(tiny, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny("llama"), tmp_path / "infinite")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    refusal_of(folder, tmp_path, "E-CONVERT-OVERFLOW", kv_heads="1")


def test_auto_that_no_number_satisfies_names_the_best(tiny, tmp_path):
    error = refusal_of(tiny("llama"), tmp_path, "E-CONVERT-ERROR-LIMIT", kv_heads="auto", max_error=0.01)
    assert "within 0.01; 1 heads come to" in error.what
    refusal_of(tiny("llama_mqa"), tmp_path, "E-CONVERT-ONE-HEAD", kv_heads="auto", max_error=1.0)


def test_gguf_is_refused(tmp_path):
    from gqa_export.checkpoint.checkpoint import Checkpoint

    checkpoint = Checkpoint("model.gguf", tmp_path, "gguf", tmp_path / "model.gguf", {})
    with refused("E-CONVERT-GGUF"):
        convert(checkpoint, tmp_path / "out", ConvertOptions(kv_heads="1"))


def test_an_output_that_is_in_use_stays_as_it_is(tiny, tmp_path):
    folder = tiny("llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    for force in (False, True):
        with pytest.raises(GqaExportError) as refusal:
            convert(open_checkpoint(folder), tmp_path / "out", ConvertOptions(kv_heads="1", force=force))
        assert refusal.value.where == str(tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(GqaExportError) as refusal:
        convert(open_checkpoint(folder), tmp_path / "file", ConvertOptions(kv_heads="1"))
    assert refusal.value.where == str(tmp_path / "file")
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    convert(open_checkpoint(folder), tmp_path / "again", ConvertOptions(kv_heads="1", method="first"))
    convert(open_checkpoint(folder), tmp_path / "again", ConvertOptions(kv_heads="1", force=True))
    assert json.loads((tmp_path / "again" / "gqa_convert.json").read_text())["method"] == "mean"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES], ids=["a full disk", "no permission"])
@pytest.mark.parametrize("method", ["mean", "calibrated"])
def test_a_disk_that_ends_or_refuses_leaves_nothing(method, number, tiny, tmp_path, text_file, monkeypatch):
    def write(*_):
        raise OSError(number, "no")

    monkeypatch.setattr("gqa_export.conversion.checkpoint_writer.write_safetensors", write)
    output = tmp_path / "parent" / "out"
    with pytest.raises(GqaExportError) as refusal:
        convert(open_checkpoint(tiny("llama", num_hidden_layers=1)), output,
                ConvertOptions(kv_heads="1", method=method, text=text_file))
    assert not output.parent.exists() or list(output.parent.iterdir()) == []
    assert refusal.value.__cause__.errno == number


def test_expanding_to_a_number_that_is_not_a_multiple_is_refused(tiny, tmp_path):
    with refused("E-CONVERT-NOT-A-MULTIPLE"):
        expand(open_checkpoint(tiny("llama")), tmp_path / "out", 3)
