"""Every architecture whose GGUF files are read, against a decoder that shares nothing with the reader."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_judge import Judge
from gguf_models import CASES, EXPERTS, RMS, SIZES, YARN, case, ramp, tensors_of, write_case, write_gguf
from gguf_run import exported_logits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusal import refused

from gqa_export.checkpoint.gguf_config import gguf_config, gguf_facts
from gqa_export.checkpoint.gguf_facts import GgufFacts
from gqa_export.checkpoint.gguf_families import FAMILIES
from gqa_export.checkpoint.gguf_keys import KEYS, Applied
from gqa_export.checkpoint.load_config import load_config
from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.checkpoint.tokenizer import token_ids
from gqa_export.errors import GqaExportError, InvalidCheckpoint, UnsupportedModel

IDS = [3, 17, 5, 60, 22, 9, 41, 7, 8, 30, 12, 2, 1, 55, 20]
"""longer than every window of the cases"""
DEEP = ("gemma2 27B", "gemma3 27B")
EXPORTED = ("llama MHA", "llama biases", "llama 3", "llama divisors", "llama YaRN factors", "qwen2", "qwen3",
            "qwen3moe", "phi3", "phi3 LongRoPE", "gemma2", "gemma3", "starcoder2", "stablelm")


def allowed(name: str) -> float:
    """float32 against float64 with logits of size 2 to 4: 1e-5 were measured over 2 or 3 layers, 1e-4 over 62. The
    smallest fault known of the kind (a softcap of another size) is 5e-3."""
    return 1e-3 if name in DEEP else 1e-4


def torch_logits(path: Path) -> np.ndarray:
    with torch.no_grad():
        return load_model(open_checkpoint(path))(torch.tensor([IDS])).logits[0].double().numpy()


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_the_model_that_it_describes(tmp_path, name):
    path = write_case(tmp_path / "model.gguf", name)
    assert np.abs(torch_logits(path) - Judge(path).logits(IDS)).max() < allowed(name)


@pytest.mark.parametrize("stored", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_matrices_of_another_type_are_dequantized_and_norms_keep_their_digits(tmp_path, name, stored):
    path = write_case(tmp_path / "model.gguf", name, {"feed_forward_length": 64},
                      tensors={key: np.resize(value, [64 if size == 48 else size for size in value.shape])
                               for key, value in case(name)[2].items()}, stored=GGMLQuantizationType[stored])
    with torch.no_grad():
        found = load_model(open_checkpoint(path), "fp32")(torch.tensor([IDS])).logits[0].double().numpy()
    assert np.abs(found - Judge(path).logits(IDS)).max() < allowed(name)


def test_every_architecture_is_among_the_cases():
    assert {architecture for architecture, _, _ in CASES.values()} == set(FAMILIES)


@pytest.mark.whole_model
@pytest.mark.parametrize("name", EXPORTED)
def test_the_exported_graph_is_the_model_that_the_file_describes(tmp_path, name):
    """Prefill of nine tokens and a step for each of the others, in ONNX Runtime itself."""
    path = write_case(tmp_path / "model.gguf", name)
    found = exported_logits(path, tmp_path / "bundle", IDS, 9, 32 if name == "phi3 LongRoPE" else None)
    assert np.abs(found - Judge(path).logits(IDS)).max() < allowed(name)


@pytest.mark.parametrize("name", [name for name in CASES if name not in DEEP])
def test_a_file_with_one_key_fewer_is_right_or_refused(tmp_path, name):
    needed = []
    for number, key in enumerate(case(name)[1]):
        path = write_case(tmp_path / f"{number}.gguf", name, drop=[key])
        try:
            found = torch_logits(path)
        except GqaExportError:
            needed.append(key)
            continue
        assert np.abs(found - Judge(path).logits(IDS)).max() < allowed(name), key
    assert not {"vocab_size", "rope.freq_base", "attention.value_length"} & set(needed)


@pytest.mark.parametrize("name", [name for name in CASES if name not in DEEP])
def test_a_file_with_one_tensor_fewer_is_right_or_refused(tmp_path, name):
    for number, tensor in enumerate(tensor for tensor in case(name)[2] if not tensor.startswith("blk.0")):
        path = write_case(tmp_path / f"{number}.gguf", name, drop=[tensor])
        try:
            found = torch_logits(path)
        except (InvalidCheckpoint, UnsupportedModel):
            continue
        assert np.abs(found - Judge(path).logits(IDS)).max() < allowed(name), tensor


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("key", ["attention.temperature_length", "logit_scale", "rope.dimension_sections", "zzz"])
def test_a_key_that_is_not_known_is_refused_by_its_name(tmp_path, architecture, key):
    name = next(name for name, (found, _, _) in CASES.items() if found == architecture)
    path = write_case(tmp_path / "model.gguf", name, {key: 1.0})
    with refused("E-CKPT-GGUF-KEY", UnsupportedModel) as refusal:
        open_checkpoint(path)
    assert f"{architecture}.{key} = 1.0" in refusal.error.what


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("tensor", ["blk.1.attn_sinks.weight", "output.bias", "blk.1.attn_q.scale",
                                    "blk.2.attn_q.weight", "blk.01.attn_q.weight", "blk.0.nextn.eh_proj.weight",
                                    "dense_2.weight"])
def test_a_tensor_that_is_not_used_is_refused_by_its_name(tmp_path, architecture, tensor):
    name = next(name for name, (found, _, _) in CASES.items() if found == architecture)
    tensor = "blk.3.attn_q.weight" if tensor == "blk.2.attn_q.weight" and architecture == "gemma3" else tensor
    path = write_case(tmp_path / "model.gguf", name, tensors={tensor: np.ones(16, np.float32)})
    with refused("E-CKPT-GGUF-TENSOR", UnsupportedModel) as refusal:
        open_checkpoint(path)
    assert tensor in refusal.error.what


@pytest.mark.parametrize(("name", "tensor"), [
    ("phi3", "blk.0.attn_qkv.bias"), ("phi3", "blk.0.attn_q.weight"), ("qwen2", "blk.0.attn_output.bias"),
    ("stablelm", "blk.0.attn_output.bias"), ("llama", "blk.0.attn_norm.bias"), ("llama", "output_norm.bias"),
    ("llama joined", "blk.0.attn_q.weight"), ("gemma2", "rope_freqs.weight"), ("gemma3", "rope_factors_long.weight")])
def test_a_tensor_for_which_transformers_has_no_place_is_refused(tmp_path, name, tensor):
    path = write_case(tmp_path / "model.gguf", name, tensors={tensor: np.ones(8, np.float32)})
    with refused("E-CKPT-GGUF-ROPE" if "rope" in tensor else "E-CKPT-GGUF-TENSOR", UnsupportedModel) as refusal:
        open_checkpoint(path)
    assert tensor.replace("attn_q.", "attn_qkv.") in refusal.error.what


@pytest.mark.parametrize(("name", "key", "value"), [
    ("llama", "rope.dimension_count", 4), ("llama", "attention.value_length", 12), ("llama", "expert_count", 8),
    ("llama", "attention.sliding_window", 6), ("llama", "attn_logit_softcapping", 30.0), ("llama", "vocab_size", 60),
    ("llama", "attention.causal", False), ("llama", "pooling_type", 3), ("llama", "attention.scale", 0.5),
    ("llama", "tensor_data_layout", "another"), ("llama", "rope.freq_base_swa", 10000.0),
    ("llama", "attention.sliding_window_pattern", 2), ("llama YaRN", "rope.scaling.yarn_ext_factor", 0.5),
    ("llama YaRN", "rope.scaling.yarn_log_multiplier", 0.1), ("phi3", "attention.key_length", 12),
    ("gemma2", "rope.freq_base_swa", 10000.0), ("gemma3", "attn_logit_softcapping", 50.0),
    ("gemma2", "attention.scale", 0.2), ("qwen3", "rope.dimension_count", 8), ("starcoder2", "nextn_predict_layers", 1),
    ("stablelm", "attention.layer_norm_rms_epsilon", 1e-6)])
def test_a_value_that_cannot_be_applied_is_refused_by_the_name_of_its_key(tmp_path, name, key, value):
    path = write_case(tmp_path / "model.gguf", name, {key: value})
    with refused("E-CKPT-GGUF-KEY-VALUE", UnsupportedModel) as refusal:
        open_checkpoint(path)
    assert f"{CASES[name][0]}.{key} = " in refusal.error.what


@pytest.mark.parametrize(("name", "key", "value"), [
    ("llama", "attention.value_length", 8), ("llama", "expert_count", 0), ("llama", "attention.sliding_window", 0),
    ("llama", "rope.scaling.finetuned", True), ("llama", "attention.scale", 8 ** -0.5),
    ("llama", "attention.causal", True),
    ("llama", "tensor_data_layout", "Meta AI original pth"), ("gemma2", "rope.freq_base_swa", 4000.0),
    ("llama", "attention.head_count_kv", [2, 2]), ("llama", "feed_forward_length", [48, 48]),
    ("gemma3", "attention.sliding_window_pattern", [True, False, True]),
    ("gemma2", "attention.sliding_window_pattern", [False, True]), ("gemma3", "attention.sliding_window_pattern", 1),
    ("gemma3", "attention.sliding_window_pattern", 2), ("gemma3", "attention.sliding_window", 0),
    ("llama", "rope.scaling.attn_factor", 1.25), ("llama YaRN", "rope.scaling.attn_factor", 1.25),
    ("llama linear", "rope.scaling.attn_factor", 1.25), ("llama divisors", "rope.scaling.attn_factor", 0.75),
    ("llama divisors", "rope.scaling.factor", 2.0), ("llama 3", "rope.scaling.factor", 2.0),
    ("phi3", "rope.scaling.factor", 2.0), ("stablelm", "rope.scaling.factor", 2.0)])
def test_other_values_are_applied_too(tmp_path, name, key, value):
    path = write_case(tmp_path / "model.gguf", name, {key: value})
    assert np.abs(torch_logits(path) - Judge(path).logits(IDS)).max() < allowed(name)


@pytest.mark.parametrize(("name", "keys"), [
    ("llama", {"attention.head_count_kv": [2, 1]}), ("llama", {"feed_forward_length": [48, 32]}),
    ("llama", {"rope.freq_base": "many"}), ("llama", {"block_count": 0}), ("llama", {"rope.freq_base": float("nan")}),
    ("llama", {"attention.head_count_kv": 3}), ("phi3", {"rope.dimension_count": 3}),
    ("llama", {"rope.scaling.type": "other"}), ("llama divisors", {"rope.scaling.type": "yarn"}),
    ("phi3", YARN), ("llama", {"rope.scaling.yarn_beta_fast": 16.0}),
    ("llama", {"rope.scaling.type": "yarn"}), ("llama", {"rope.scaling.type": "longrope"})])
def test_senseless_values_and_combinations_are_refused(tmp_path, name, keys):
    path = write_case(tmp_path / "model.gguf", name, keys)
    with pytest.raises((InvalidCheckpoint, UnsupportedModel)) as refusal:
        open_checkpoint(path)
    assert refusal.value.code in ("E-CKPT-GGUF-LAYERS", "E-CKPT-GGUF-VALUE", "E-CKPT-GGUF-ROPE", "E-CKPT-GGUF-LACKS",
                                  "E-CKPT-TENSORS-MISSING")


PAIRS = {"rope.scaling.type": ("none", "linear"), "attention.sliding_window_pattern": (2, 3)}
CONTEXT = {"attention.sliding_window_pattern": {"attention.sliding_window": 6},
           "rope.scaling.type": {"rope.scaling.factor": 4.0},
           **{f"rope.scaling.{name}": YARN for name in ("yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow",
                                                        "original_context_length")}}
APPLIED = [(architecture, suffix) for suffix, rules in KEYS.items() for architecture in FAMILIES
           if isinstance(rules[0], Applied) and (not rules[0].families or architecture in rules[0].families)]


@pytest.mark.parametrize(("architecture", "suffix"), APPLIED)
def test_a_key_that_is_called_applied_changes_the_configuration(tmp_path, architecture, suffix):
    epsilon = {FAMILIES[architecture].epsilon[0]: 1e-5}
    keys = {**SIZES, **epsilon, **(EXPERTS if FAMILIES[architecture].experts else {})}
    if architecture != "phi3" or suffix == "rope.scaling.type":
        keys |= CONTEXT.get(suffix, {})
    first = keys.get(suffix, 2)
    values = PAIRS.get(suffix) or ((first, 2 * first) if isinstance(first, int) else (first, first * 2))
    if "rope" in suffix or "softcap" in suffix:
        values = PAIRS.get(suffix) or ((2, 4) if "count" in suffix or "length" in suffix else (2.0, 4.0))
    held = tensors_of(architecture, keys, {"tied": 1})
    found = []
    for number, value in enumerate(values):
        path = tmp_path / f"{number}.gguf"
        write_gguf(path, architecture, {**keys, suffix: value}, held, {})
        facts = gguf_facts(path) if suffix != "block_count" else GgufFacts(
            replace(gguf_facts(tmp_path / "0.gguf").header, metadata={
                **gguf_facts(tmp_path / "0.gguf").header.metadata, f"{architecture}.block_count": value}))
        found.append(gguf_config(facts))
    assert found[0] != found[1]


def test_published_llama_3_files_get_the_parameters_of_their_configuration(tmp_path):
    """Llama 3.1 8B: theta 5e5, head size 128, factor 8, low and high 1 and 4, 8192 tokens."""
    from gguf_models import llama3_divisors

    keys = {**RMS, "attention.key_length": 128, "attention.value_length": 128, "rope.dimension_count": 128,
            "rope.freq_base": 5e5, "context_length": 131072}
    whole = {**SIZES, **keys}
    tensors = {**tensors_of("llama", whole, {}), "rope_freqs.weight": llama3_divisors(64, 5e5, 8192, 4, 8)}
    write_gguf(tmp_path / "model.gguf", "llama", whole, tensors, {})
    assert open_checkpoint(tmp_path / "model.gguf").config["rope_parameters"] == {
        "rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}


def test_longrope_beyond_the_original_length_takes_the_long_table(tmp_path):
    path = write_case(tmp_path / "model.gguf", "phi3 LongRoPE", {"rope.scaling.original_context_length": 12})
    assert np.abs(torch_logits(path) - Judge(path).logits(IDS, 64)).max() < 1e-4
    path = write_case(tmp_path / "other.gguf", "phi3 LongRoPE",
                      tensors={"rope_factors_long.weight": ramp(1.0, 2.0, 3)})
    with refused("E-CKPT-GGUF-VALUE", InvalidCheckpoint):
        open_checkpoint(path)


@pytest.mark.parametrize(("tokens", "ends"), [
    ({"eos": 5}, [5]), ({"eos": 5, "eot": 7}, [5, 7]), ({"eos": 5, "eot": 5, "eom": 9}, [5, 9]), ({"eom": 9}, [9]),
    ({"eos": 61, "eot": 7, "padding": 4294967295}, [7]), ({"bos": 1}, [])])
def test_a_text_ends_at_the_ends_of_texts_turns_and_messages(tmp_path, tokens, ends):
    path = write_case(tmp_path / "model.gguf", "llama",
                      tokens={f"tokenizer.ggml.{name}_token_id": value for name, value in tokens.items()})
    checkpoint = open_checkpoint(path)
    assert token_ids(checkpoint) == {"eos": ends, "bos": tokens.get("bos"), "pad": None}


def test_fewer_tokens_than_rows_and_a_vocabulary_size_beside_the_list(tmp_path):
    """StarCoder 2 files have both; transformers' own reader takes the number of tokens for the rows."""
    path = write_case(tmp_path / "model.gguf", "starcoder2",
                      tokens={"tokenizer.ggml.tokens": [f"t{number}" for number in range(50)]})
    assert open_checkpoint(path).config["vocab_size"] == 61
    assert np.abs(torch_logits(path) - Judge(path).logits(IDS)).max() < 1e-4


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_metadata_never_raises_anything_else(tmp_path, data):
    path = tmp_path / "whole.gguf"
    if not path.is_file():
        write_case(path, "gemma3", tokens={"split.count": 1, "split.no": 0, "general.type": "model"})
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(24, 1500), min_size=1, max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    (tmp_path / "fuzzed").mkdir(exist_ok=True)
    (tmp_path / "fuzzed" / "model.gguf").write_bytes(content)
    with contextlib.suppress(InvalidCheckpoint, UnsupportedModel):
        load_config(open_checkpoint(tmp_path / "fuzzed" / "model.gguf"))


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix"])
def test_a_file_that_is_not_a_model_is_refused(tmp_path, kind):
    path = write_case(tmp_path / "model.gguf", "llama", tokens={"general.type": kind})
    with refused("E-CKPT-GGUF-TYPE", UnsupportedModel):
        open_checkpoint(path)
