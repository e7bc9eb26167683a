"""Loading: weights arrive as stored, nothing is printed, and what is not a whole attention decoder is refused."""

from __future__ import annotations

import json

import gqa_models
import numpy as np
import pytest
import torch
from gqa_models.shrink import small_config, write_small
from refusal import refused
from safetensors.torch import load_file, save_file

from gqa_export.checkpoint.load_config import load_config
from gqa_export.checkpoint.load_model import load_model, load_skeleton
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.errors import InvalidCheckpoint, UnsupportedModel

DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt_oss", "granite", "cohere",
            "stablelm", "mixtral", "smollm3", "gpt2", "phi3_longrope"]  # fmt: skip


def tiny(tmp_path, name, **overrides):
    return open_checkpoint(gqa_models.write_tiny(name, tmp_path / name, **overrides))


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_loads_whole_and_gives_the_logits_that_transformers_gives(name, tmp_path, capfd):
    from transformers import AutoModelForCausalLM

    checkpoint = tiny(tmp_path, name)
    capfd.readouterr()
    model = load_model(checkpoint)
    skeleton = load_skeleton(checkpoint)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert not model.training
    assert {key: value.shape for key, value in skeleton.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()}
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    reference = AutoModelForCausalLM.from_pretrained(checkpoint.folder, attn_implementation="eager").eval()
    ids = torch.randint(4, 300, (2, 40))
    with torch.no_grad():
        difference = (model(ids).logits - reference(ids).logits).abs().max().item()
    assert difference < 1e-5  # fp32; only the order in which experts are summed may differ


def test_fewer_layers_can_be_loaded_and_lists_of_one_value_a_layer_follow(tmp_path, capfd):
    checkpoint = tiny(tmp_path, "gemma3")
    capfd.readouterr()
    model = load_model(checkpoint, "fp64", num_hidden_layers=2)
    assert capfd.readouterr() == ("", "")
    assert len(model.model.layers) == 2
    assert model.config.layer_types == ["sliding_attention"] * 2
    assert model.dtype == torch.float64
    with pytest.raises(KeyError, match="no_such_field"):
        load_model(checkpoint, no_such_field=1)


@pytest.mark.parametrize(
    ("name", "code", "named"),
    [
        ("t5", "E-MODEL-ENCODER-DECODER", ""),
        ("recurrent_gemma", "E-MODEL-LAYER-TYPE", "layer 0"),
        ("minimax", "E-MODEL-LAYER-TYPE", "'linear_attention'"),
        ("deepseek_v4", "E-MODEL-LAYER-TYPE", "'heavily_compressed_attention'"),
    ],
)
def test_what_is_not_a_grouped_attention_decoder_is_refused_by_its_config(name, code, named, tmp_path):
    """Layers whose state does not go through a kernel function of transformers."""
    tiny_model = name in gqa_models.tiny_names()
    folder = (gqa_models.write_tiny if tiny_model else write_small)(name, tmp_path)
    with refused(code, UnsupportedModel) as refusal:
        load_skeleton(open_checkpoint(folder))
    assert named in refusal.error.what
    assert "decoder-only" in refusal.error.fix


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("recurrent_gemma", ("layer 0", "RecurrentGemmaRecurrentBlock", "convolution over 4 tokens")),
        ("rwkv", ("layer 0", "RwkvSelfAttention", "a recurrent state")),
    ],
)
def test_the_same_is_seen_in_the_module_tree_alone(name, named):
    """For families whose configuration does not show it: state is found in the modules themselves."""
    from transformers import AutoModelForCausalLM

    from gqa_export.checkpoint.refusals import refuse_modules

    model = AutoModelForCausalLM.from_config(small_config(name))
    with refused("E-MODEL-STATE", UnsupportedModel) as refusal:
        refuse_modules(model, "here")
    assert all(part in refusal.error.what for part in named)
    assert "here" in refusal.error.where


def test_a_recurrent_parameter_and_a_layer_without_attention_are_seen(tmp_path):
    from gqa_export.checkpoint.refusals import refuse_modules

    model = load_model(tiny(tmp_path, "llama"))
    model.model.layers[1].mlp.A_log = torch.nn.Parameter(torch.ones(3))
    with refused("E-MODEL-STATE") as refusal:
        refuse_modules(model, "here")
    assert refusal.error.where.endswith("layers.1.mlp.A_log")
    del model.model.layers[1].mlp.A_log
    model.model.layers[2].self_attn = torch.nn.Linear(4, 4)
    with refused("E-MODEL-NO-ATTENTION") as refusal:
        refuse_modules(model, "here")
    assert "layer 2" in refusal.error.what


def test_the_two_attentions_of_one_layer_are_not_taken_for_two_layers():
    """A LongCat-Flash of one layer says that it has two, and has a list of two attentions in it."""
    from gqa_export.checkpoint.decoder_layers import layer_lists
    from gqa_export.checkpoint.refusals import refuse_modules
    from gqa_export.trace import attention_hook, skeleton
    from gqa_export.trace.probe import layer_probe

    config = small_config("longcat_flash", num_layers=1)
    assert config.num_hidden_layers == 2
    model = skeleton.build(config, torch.float32, device="meta", attention=attention_hook.register())
    refuse_modules(model, "here")
    assert len(layer_probe.probe(config, model).layers) == 2, "both attentions have a cache"
    assert [name for name, _ in layer_lists(model, 1)] == ["model.layers"]
    assert not list(layer_lists(model, 2))


def test_a_model_without_layers_is_refused_as_one_and_layers_of_an_encoder_do_not_count():
    from gqa_export.checkpoint.refusals import refuse_config

    for config in (small_config("llama", num_hidden_layers=0), small_config("longcat_flash", num_hidden_layers=1),
                   small_config("bart", decoder_layers=0, is_encoder_decoder=False)):
        with refused("E-CKPT-CONFIG-VALUE", InvalidCheckpoint) as refusal:
            refuse_config(config, "here")
        assert "no layers" in refusal.error.what
    refuse_config(small_config("bart", encoder_layers=0, is_encoder_decoder=False), "here")


def test_an_encoder_beside_the_decoder_is_called_one(tmp_path):
    from gqa_export.checkpoint.refusals import refuse_modules

    model = load_model(tiny(tmp_path, "llama"))
    model.model.vision = torch.nn.Sequential(torch.nn.Conv2d(3, 8, kernel_size=14))
    with refused("E-MODEL-ENCODER") as refusal:
        refuse_modules(model, "here")
    assert "vision.0" in refusal.error.where
    refuse_modules(model, "here", text_only=True)  # text does not pass it
    model.model.layers[1].mlp.mixer = torch.nn.Conv1d(8, 8, kernel_size=4)
    with refused("E-MODEL-STATE") as refusal:
        refuse_modules(model, "here", text_only=True)
    assert "layers.1.mlp.mixer" in refusal.error.where


def edit(checkpoint, **values):
    config = json.loads((checkpoint.folder / "config.json").read_text())
    (checkpoint.folder / "config.json").write_text(json.dumps({**config, **values}))
    return open_checkpoint(checkpoint.folder)


def test_cross_attention_is_refused(tmp_path):
    checkpoint = edit(tiny(tmp_path, "bert"), add_cross_attention=True)
    with refused("E-MODEL-CROSS-ATTENTION", UnsupportedModel):
        load_config(checkpoint)


@pytest.mark.parametrize(
    ("values", "code", "named"),
    [
        ({"model_type": "never_heard_of"}, "E-MODEL-UNKNOWN", "'never_heard_of'"),
        ({"model_type": None}, "E-MODEL-UNKNOWN", "None"),
        ({"model_type": "own", "auto_map": {"AutoModel": "x.Y"}}, "E-MODEL-UNKNOWN", "code that comes with"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "E-MODEL-NOT-CAUSAL", "LlamaForSequenceClassification"),
        ({"model_type": "vit", "architectures": None}, "E-MODEL-NOT-CAUSAL", "'vit'"),
    ],
)
def test_an_unknown_architecture_or_one_without_a_language_head_is_refused(values, code, named, tmp_path):
    checkpoint = edit(tiny(tmp_path, "llama"), **values)
    with refused(code, UnsupportedModel) as refusal:
        load_model(checkpoint)
    assert named in refusal.error.what
    assert refusal.error.fix


def rewrite(checkpoint, change):
    tensors = load_file(checkpoint.folder / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint.folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(checkpoint.folder)


@pytest.mark.parametrize(
    ("name", "gone", "named"),
    [
        ("llama", "model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.k_proj.weight"),
        ("llama", "lm_head.weight", "lm_head.weight"),
        ("gpt_oss", "model.layers.0.self_attn.sinks", "model.layers.0.self_attn.sinks"),
        ("mixtral", "model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.o_proj.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w1.weight", "model.layers.1.mlp.experts.gate_up_proj"),
    ],
)
def test_a_missing_tensor_is_refused_by_name(name, gone, named, tmp_path):
    checkpoint = rewrite(tiny(tmp_path, name), lambda tensors: tensors.pop(gone))
    with refused("E-CKPT-TENSORS-MISSING", InvalidCheckpoint) as refusal:
        load_model(checkpoint)
    assert named in refusal.error.what


def test_a_wholly_missing_expert_is_refused(tmp_path):
    def drop(tensors):
        for name in [name for name in tensors if "layers.1.block_sparse_moe.experts.3." in name]:
            del tensors[name]

    with refused("E-CKPT-TENSORS-SHAPE", InvalidCheckpoint) as refusal:
        load_model(rewrite(tiny(tmp_path, "mixtral"), drop))
    assert "experts.down_proj (3, 64, 128) instead of (4, 64, 128)" in refusal.error.what


def test_a_tied_head_need_not_be_in_the_file(tmp_path):
    checkpoint = tiny(tmp_path, "llama_tied")
    assert "lm_head.weight" not in checkpoint.tensors
    model = load_model(checkpoint)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(tmp_path):
    def shrink(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:32].clone()

    with refused("E-CKPT-TENSORS-SHAPE", InvalidCheckpoint) as refusal:
        load_model(rewrite(tiny(tmp_path, "llama"), shrink))
    assert "model.norm.weight (32,) instead of (64,)" in refusal.error.what


def test_glassllm_as_a_checkpoint_is_the_model_of_its_package(tmp_path):
    """The conversion of the test suite's real model, against the package's own forward pass in fp64."""
    from glassllm.model import GlassLM
    from glassllm.tokenizer import Tokenizer
    from glassllm_checkpoint import glassllm_weights, write_glassllm
    from transformers import AutoTokenizer

    checkpoint = open_checkpoint(write_glassllm(tmp_path))
    assert checkpoint.stored_dtype == "float16"
    theirs = GlassLM.load(glassllm_weights(), dtype=np.float64)
    ids = np.random.default_rng(0).integers(4, 1024, (2, 100))
    with torch.no_grad():
        ours = load_model(checkpoint, "fp64")(torch.tensor(ids)).logits.numpy()
    # transformers computes rotary angles in fp32: 100 positions * 6e-8 relative, amplified by logits of size 20
    assert np.abs(ours - theirs(ids).data).max() < 5e-5
    tokenizer, original = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(
        glassllm_weights().parent / "en.tokenizer.json")  # fmt: skip
    for text in ("Alice was beginning to get very tired", "a  b\n\nc caf\u00e9 #", " x\n"):
        assert tokenizer.encode(text) == original.encode(text)
    assert tokenizer.decode(original.encode("Off with  her\nhead!")) == "Off with  her\nhead!"
