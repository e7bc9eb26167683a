"""Opening: every form a checkpoint comes in, and a refusal with cause, place and fix for what it must not be."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import gqa_models
import pytest
from refusal import refused

from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.checkpoint.tokenizer import has_tokenizer, token_ids
from gqa_export.errors import GqaExportError, InvalidCheckpoint, UnsupportedModel
from gqa_export.exporting.tokenizer_files import add_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return gqa_models.write_tiny("llama", tmp_path_factory.mktemp("llama") / "ck")


@pytest.fixture
def copy(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "ck")


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return folder


def shard(folder):
    """Split model.safetensors of a folder into two shards with an index, as save_pretrained would."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def refusal_of(source, code, fix, kind=InvalidCheckpoint):
    with refused(code, kind) as refusal:
        open_checkpoint(source)
    assert refusal.error.where
    assert fix in refusal.error.fix
    assert refusal.error.exit_code == 2
    return refusal.error


def test_a_folder_opens_with_its_facts_and_without_importing_torch(llama):
    code = ("import sys; from gqa_export.checkpoint.open import open_checkpoint; c = open_checkpoint(sys.argv[1]);"
            "assert not {'torch', 'transformers', 'onnx', 'numpy'} & set(sys.modules);"
            "print(c.kind, c.stored_dtype, len(c.tensors), c.config['model_type'])")
    done = subprocess.run([sys.executable, "-c", code, str(llama)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["hf", "float32", "30", "llama"]


def test_the_stored_dtype_is_that_of_the_tensors_even_when_the_config_says_otherwise(tmp_path):
    folder = edit_config(gqa_models.write_tiny("llama", tmp_path, dtype="bfloat16"), dtype="float32")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.stored_dtype == "bfloat16"
    assert str(load_model(checkpoint).dtype) == "torch.bfloat16"


def test_shards_are_read_as_one(copy):
    import torch

    whole = load_model(open_checkpoint(copy)).state_dict()
    checkpoint = open_checkpoint(shard(copy))
    assert len({tensor.path for tensor in checkpoint.tensors.values()}) == 2
    parts = load_model(checkpoint).state_dict()
    assert set(parts) == set(whole)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def hub_cache(root, folder):
    """The layout of the hub's cache: snapshots of symbolic links to blobs."""
    repo = root / "models--some--model"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, repo / "blobs" / f"{number:064}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064}")
    return snapshot


def test_a_hub_snapshot_made_of_symbolic_links_opens(llama, tmp_path):
    checkpoint = open_checkpoint(hub_cache(tmp_path, llama))
    assert load_model(checkpoint).config.model_type == "llama"


def test_a_hub_id_in_the_local_cache_opens_without_a_network(llama, tmp_path, monkeypatch):
    hub_cache(tmp_path, llama)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    checkpoint = open_checkpoint("some/model")
    assert (checkpoint.source, len(checkpoint.tensors)) == ("some/model", 30)
    assert load_model(checkpoint).config.num_hidden_layers == 3


def test_an_unknown_hub_id_offline_is_refused_with_its_own_code(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refusal = refusal_of("some/model", "E-CKPT-HUB-UNREACHABLE", "check the network", GqaExportError)
    assert refusal.where == "some/model"


@pytest.mark.parametrize(("status", "code"), [(None, "E-CKPT-HUB-UNREACHABLE"), (401, "E-CKPT-HUB-REFUSED"),
                                              (404, "E-CKPT-HUB-REFUSED")])
def test_a_hub_that_does_not_answer_or_refuses_is_reported(tmp_path, status, code):
    """A real request: to a closed port, or to a local server that gives this status."""
    import http.server
    import os
    import threading

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    if status is None:
        server.server_close()
    else:
        thread.start()
    program = ("import sys; from gqa_export.checkpoint.open import open_checkpoint\n"
               "try: open_checkpoint('some/model')\n"
               "except Exception as error: print(type(error).__name__, error.code, error)")
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HUB_OFFLINE": "0",
                   "HF_HOME": str(tmp_path)}
    try:
        printed = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True,
                                 timeout=120, check=True).stdout
    finally:
        if status is not None:
            server.shutdown()
            thread.join()
            server.server_close()
    assert printed.startswith(f"GqaExportError {code} ")
    assert status is None or f"HTTP {status}" in printed


def test_the_refusal_of_a_place_that_does_not_exist_names_it(tmp_path):
    refusal = refusal_of(tmp_path / "nothing", "E-CKPT-NOT-FOUND", "hub id")
    assert "nothing" in refusal.where
    refusal_of(str(tmp_path / "org" / "name"), "E-CKPT-NOT-FOUND", "config.json")


def test_a_folder_without_config_is_refused_and_a_gguf_in_it_pointed_out(tmp_path):
    refusal_of(tmp_path, "E-CKPT-NO-CONFIG", "config.json")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refusal_of(tmp_path, "E-CKPT-NO-CONFIG", str(tmp_path / "model.gguf"))


def test_a_file_of_a_checkpoint_is_refused_with_its_folder_as_the_fix(copy):
    for name in ("model.safetensors", "config.json"):
        refusal_of(copy / name, "E-CKPT-ONE-FILE", str(copy))


@pytest.mark.parametrize("content", ["{", "[1]", "\x00", "[" * 100_000])
def test_a_config_that_is_not_a_json_object_is_refused(copy, content):
    (copy / "config.json").write_text(content)
    with pytest.raises(GqaExportError) as refusal:
        open_checkpoint(copy)
    assert isinstance(refusal.value.__cause__, ValueError | RecursionError)
    assert refusal.value.where == str(copy / "config.json")


def test_a_config_that_cannot_be_read_is_refused(copy):
    (copy / "config.json").unlink()
    (copy / "config.json").symlink_to("/proc/self/mem")  # a regular file whose first page cannot be read, even by root
    with pytest.raises(GqaExportError) as refusal:
        open_checkpoint(copy)
    assert isinstance(refusal.value.__cause__, OSError)
    assert "Input/output error" in refusal.value.what


def test_a_config_that_transformers_reads_and_cannot_build_is_refused(copy):
    edit_config(copy, hidden_act="no_such_activation")
    with refused("E-CKPT-LOAD", InvalidCheckpoint) as refusal:
        load_model(open_checkpoint(copy))
    assert "KeyError" in refusal.error.what


def test_a_config_with_nonsense_values_is_refused_without_a_traceback_of_transformers(copy):
    edit_config(copy, hidden_size="many")
    with refused("E-CKPT-CONFIG-VALUE", InvalidCheckpoint) as refusal:
        load_model(open_checkpoint(copy))
    assert "hidden_size 'many'" in refusal.error.what


def test_a_peft_adapter_is_refused(copy):
    (copy / "adapter_config.json").write_text("{}")
    refusal_of(copy, "E-CKPT-ADAPTER", "merge")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickled_weights_are_refused_unopened(copy, name):
    (copy / "model.safetensors").rename(copy / name)
    refusal_of(copy, "E-CKPT-PICKLE", "save_pretrained")


def test_a_folder_without_weights_and_a_dangling_link_are_refused(copy):
    (copy / "model.safetensors").unlink()
    refusal_of(copy, "E-CKPT-NO-WEIGHTS", "config.json")
    (copy / "model.safetensors").symlink_to(copy / "gone")
    refusal_of(copy, "E-CKPT-BROKEN-LINK", "download")


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8", "bitsandbytes", "compressed-tensors"])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32"])
def test_a_quantized_checkpoint_is_refused_naming_the_method(copy, method, dtype):
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(getattr(torch, dtype))
    save_file(tensors, copy / "model.safetensors")
    folder = edit_config(copy, quantization_config={"quant_method": method})
    assert f"({method}: {name}" in refusal_of(folder, "E-MODEL-QUANTIZED", "unquantized", UnsupportedModel).what


@pytest.mark.parametrize("method", ["bitnet", "of next year"])
def test_a_method_that_rounds_plain_weights_or_is_unknown_is_refused(copy, method):
    folder = edit_config(copy, quantization_config={"quant_method": method})
    assert f"({method})" in refusal_of(folder, "E-MODEL-QUANTIZED", "unquantized", UnsupportedModel).what


@pytest.mark.parametrize("entry", [
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_8bit": False}},
    {"quantization_config": {"load_in_8bit": True, "llm_int8_threshold": 6.0}},
    {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
    {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    {"compression_config": {"quant_method": "compressed-tensors", "format": "dense"}}])
@pytest.mark.parametrize("pickled", [False, True])
def test_a_quantization_left_over_beside_plain_weights_is_noted_and_ignored(copy, tmp_path, entry, pickled):
    import numpy as np
    import torch
    from safetensors.torch import load_file

    from gqa_export.checkpoint.load_model import load_model
    from gqa_export.checkpoint.pickle_permission import Trust, trusting
    from gqa_export.exporting.options import ExportOptions
    from gqa_export.exporting.to_onnx import export_onnx
    from gqa_export.runtime.ort.session import OrtSession

    plain = load_model(open_checkpoint(copy), "fp32")
    folder, ids = edit_config(copy, **entry), np.arange(4, 20)[None]
    if pickled:
        torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
        (copy / "model.safetensors").unlink()
    with trusting(Trust(pickle=pickled)):
        export = export_onnx(folder, tmp_path / "bundle", ExportOptions(capacity=32))
        reference = load_model(open_checkpoint(folder), "fp32")
    method = next(iter(entry.values())).get("quant_method", "bitsandbytes")
    assert any(f"({method})" in note and "left over" in note for note in export.notes)
    with torch.no_grad():
        expected = plain(torch.from_numpy(ids)).logits.numpy()
        np.testing.assert_array_equal(reference(torch.from_numpy(ids)).logits.numpy(), expected)
    np.testing.assert_allclose(OrtSession.load(tmp_path / "bundle", "cpu").step(ids).logits, expected, atol=2e-5)


def test_weights_in_eight_bits_without_a_word_in_the_config_are_refused(copy):
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, copy / "model.safetensors")
    refusal = refusal_of(copy, "E-MODEL-QUANTIZED", "unquantized", UnsupportedModel)
    assert f"float8_e4m3fn: {name}" in refusal.what


def test_a_multimodal_wrapper_is_refused_naming_its_parts(copy):
    edit_config(copy, text_config={"model_type": "llama"}, vision_config={"model_type": "siglip"})
    assert "(text and vision)" in refusal_of(copy, "E-MODEL-MULTIMODAL", "--text-only", UnsupportedModel).what


@pytest.mark.parametrize("cut", [40, 610_000, 611_078], ids=["in the data", "in the header", "in its length"])
def test_a_truncated_safetensors_is_refused(copy, cut):
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[:-cut])
    assert "model.safetensors" in refusal_of(copy, "E-CKPT-TRUNCATED", "truncated").where


def test_a_missing_shard_an_incomplete_shard_and_a_bad_index_are_refused(copy):
    shard(copy)
    index = copy / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    first = copy / "model-00001-of-00002.safetensors"
    for weight_map, code in (({**good["weight_map"], "more": first.name}, "E-CKPT-TENSORS-MISSING"),
                             ({"a": "../ck/" + first.name}, "E-CKPT-INDEX"), ({"a": 3}, "E-CKPT-INDEX"),
                             ({}, "E-CKPT-INDEX")):  # fmt: skip
        index.write_text(json.dumps({"weight_map": weight_map}))
        refusal_of(copy, code, "again")
    index.write_text(json.dumps(good))
    first.unlink()
    assert first.name in refusal_of(copy, "E-CKPT-SHARD-MISSING", "again").what


def test_tokenizer_files_travel_and_a_checkpoint_without_tokenizer_says_so(copy, tmp_path):
    from gqa_export.bundle.writer import writing_bundle

    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert has_tokenizer(open_checkpoint(copy)) is False
    with writing_bundle(tmp_path / "without") as writer:
        assert "has no tokenizer" in add_tokenizer(open_checkpoint(copy), writer)
    (copy / "tokenizer.json").write_text("{}")
    (copy / "tokenizer_config.json").write_text("{}")
    (copy / "unrelated.txt").write_text("x")
    assert has_tokenizer(open_checkpoint(copy)) is True
    with writing_bundle(tmp_path / "with") as writer:
        assert add_tokenizer(open_checkpoint(copy), writer) == ""
    assert {path.name for path in (tmp_path / "with").iterdir()} == {
        "config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_token_ids_come_from_the_generation_config_first_and_every_end_counts(copy):
    assert token_ids(open_checkpoint(copy)) == {"eos": [2], "bos": 1, "pad": 0}
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8], "pad_token_id": None}))
    assert token_ids(open_checkpoint(copy)) == {"eos": [7, 8, 2], "bos": 1, "pad": 0}
    (copy / "generation_config.json").unlink()
    assert token_ids(open_checkpoint(edit_config(copy, eos_token_id=None)))["eos"] == []


def test_the_end_token_of_a_multimodal_checkpoint_is_found_in_its_text_config(copy):
    (copy / "generation_config.json").unlink(missing_ok=True)
    inner = json.loads((copy / "config.json").read_text())
    outer = {"model_type": "gemma3", "text_config": {**inner, "eos_token_id": [7, 8], "bos_token_id": 3}}
    (copy / "config.json").write_text(json.dumps(outer))
    assert token_ids(open_checkpoint(copy, text_only=True)) == {"eos": [7, 8], "bos": 3, "pad": inner["pad_token_id"]}
    (copy / "config.json").write_text(json.dumps({**outer, "eos_token_id": 4}))
    assert token_ids(open_checkpoint(copy, text_only=True))["eos"] == [4, 7, 8]
    (copy / "config.json").write_text(json.dumps({"thinker_config": {**outer, "model_type": "q"}, "model_type": "q"}))
    assert token_ids(open_checkpoint(copy, text_only=True))["eos"] == [7, 8]


@pytest.mark.parametrize(("files", "ends"), [
    ({"tokenizer_config.json": {"eos_token": "<end>"}}, [2, 4]),
    ({"tokenizer_config.json": {"eos_token": {"content": "</s>"}, "eot_token": "<turn>"}}, [2, 5]),
    ({"tokenizer_config.json": {"extra_special_tokens": {"eom_token": "<turn>", "image_token": "<end>"}}}, [2, 5]),
    ({"special_tokens_map.json": {"eos_token": "<end>"}}, [2, 4]),
    ({"tokenizer_config.json": {"eos_token": "</s>"}, "special_tokens_map.json": {"eos_token": {"content": "<end>"}}},
     [2, 4]),
    ({"tokenizer_config.json": {"eos_token": "<far>", "added_tokens_decoder": {"9": {"content": "<far>"}}},
      "special_tokens_map.json": {"eos_token": "<end>"}}, [2, 9]),
    ({"tokenizer_config.json": {"eos_token": "<unknown>"}}, [2]),
    ({"tokenizer_config.json": {"eos_token": 3, "eot_token": [], "extra_special_tokens": 3}}, [2]),
], ids=str)
def test_ends_that_only_the_tokenizer_names_end_an_answer_too(copy, files, ends):
    added = [{"id": number, "content": text} for number, text in ((2, "</s>"), (4, "<end>"), (5, "<turn>"))]
    (copy / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": added}))
    for name, content in files.items():
        (copy / name).write_text(json.dumps(content))
    assert token_ids(open_checkpoint(copy))["eos"] == ends


def test_a_negative_id_stands_for_none(copy):
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [-1, 5], "pad_token_id": -1}))
    assert token_ids(open_checkpoint(copy)) == {"eos": [5, 2], "bos": 1, "pad": 0}


def test_a_quantization_left_over_in_a_model_in_memory_is_noted_and_ignored(copy, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    import gqa_export

    model = AutoModelForCausalLM.from_pretrained(copy)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    bundle = gqa_export.export(model, tmp_path / "bundle", capacity=32)
    assert any("(bitsandbytes)" in note for note in bundle.exported.notes)
    model.lm_head.weight.requires_grad_(False)
    model.lm_head.weight.data = model.lm_head.weight.data.to(torch.int8)
    with refused("E-MODEL-QUANTIZED", UnsupportedModel):
        gqa_export.export(model, tmp_path / "other", capacity=32)
