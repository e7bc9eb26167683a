"""A GGUF model in parts is read as one, whichever part is named; parts that do not make one model are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf_judge import Judge
from gguf_models import case, write_case, write_gguf
from refusal import refused

from gqa_export.checkpoint.gguf_parts import read_gguf
from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.describe.examine import stored_in_checkpoint
from gqa_export.errors import InvalidCheckpoint, UnsupportedModel

IDS = [3, 17, 5, 60, 22, 9, 41, 7]


def parts_of(folder, name="llama", **kwargs):
    """A model in files of five tensors, as llama.cpp's writer splits it, in order."""
    folder.mkdir()
    write_case(folder / "model.gguf", name, split_max_tensors=5, **kwargs)
    return sorted(folder.glob("*.gguf"))


def logits(path):
    with torch.no_grad():
        return load_model(open_checkpoint(path))(torch.tensor([IDS])).logits[0].double().numpy()


def test_any_part_and_the_folder_of_them_mean_the_whole_model(tmp_path):
    parts = parts_of(tmp_path / "parts")
    assert [part.name for part in parts] == [f"model-{number:05d}-of-00005.gguf" for number in range(1, 6)]
    whole = write_case(tmp_path / "whole.gguf", "llama")
    expected = Judge(whole).logits(IDS)
    for path in [*reversed(parts), tmp_path / "parts"]:
        checkpoint = open_checkpoint(path)
        assert checkpoint.gguf_file == parts[0]
        assert stored_in_checkpoint(checkpoint)[0] == stored_in_checkpoint(open_checkpoint(whole))[0]
        assert stored_in_checkpoint(checkpoint)[1] == sum(part.stat().st_size for part in parts)
        assert np.abs(logits(path) - expected).max() < 1e-4  # as in test_gguf_families


def test_parts_that_were_renamed_are_found_by_what_they_say_of_themselves(tmp_path):
    for number, part in enumerate(parts_of(tmp_path / "parts")):
        part.rename(part.with_name(f"{'dbeca'[number]}.gguf"))
    write_case(tmp_path / "parts" / "another.gguf", "qwen2")
    whole = write_case(tmp_path / "whole.gguf", "llama")
    assert np.abs(logits(tmp_path / "parts" / "e.gguf") - Judge(whole).logits(IDS)).max() < 1e-4
    with refused("E-CKPT-NO-CONFIG", InvalidCheckpoint):
        open_checkpoint(tmp_path / "parts")


def test_parts_that_only_their_names_tell(tmp_path):
    architecture, keys, tensors = case("llama")
    names = list(tensors)
    for number, some in enumerate((names[:8], names[8:]), start=1):
        write_gguf(tmp_path / f"m-{number:05d}-of-00002.gguf", architecture, keys if number == 1 else {},
                   {name: tensors[name] for name in some}, {})
    whole = write_case(tmp_path / "whole.gguf", "llama")
    assert np.abs(logits(tmp_path / "m-00002-of-00002.gguf") - Judge(whole).logits(IDS)).max() < 1e-4


def test_a_part_that_is_not_there_is_named(tmp_path):
    parts = parts_of(tmp_path / "parts")
    parts[2].unlink()
    for path in (parts[0], parts[4], tmp_path / "parts"):
        with refused("E-CKPT-GGUF-PARTS", InvalidCheckpoint) as refusal:
            open_checkpoint(path)
        assert "5 parts" in refusal.error.what
        assert "part 3" in refusal.error.what
    parts[0].rename(tmp_path / "alone.gguf")
    with refused("E-CKPT-GGUF-PARTS", InvalidCheckpoint) as refusal:
        open_checkpoint(tmp_path / "alone.gguf")


def test_parts_of_two_models_are_refused(tmp_path):
    parts, others = parts_of(tmp_path / "parts"), parts_of(tmp_path / "others", "qwen2")
    for number in (0, 3):
        saved = parts[number].read_bytes()
        parts[number].write_bytes(others[number].read_bytes())
        with pytest.raises((InvalidCheckpoint, UnsupportedModel)) as refusal:
            open_checkpoint(parts[1])
        assert refusal.value.code in ("E-CKPT-GGUF-PARTS", "E-CKPT-GGUF-TENSOR")
        parts[number].write_bytes(saved)
    parts[1].write_bytes(parts[2].read_bytes())
    with refused("E-CKPT-GGUF-PARTS", InvalidCheckpoint) as refusal:
        open_checkpoint(parts[0])
    assert "both part 3" in refusal.error.what


def test_a_part_that_changes_is_read_again(tmp_path):
    parts = parts_of(tmp_path / "parts")
    before = logits(parts[0])
    content = bytearray(parts[4].read_bytes())
    content[-64:] = bytes(64)
    parts[4].write_bytes(content)
    assert np.abs(logits(parts[0]) - before).max() > 1e-3


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "context_length", "attention.head_count",
                                 "feed_forward_length", "attention.layer_norm_rms_epsilon"])
def test_a_file_without_its_hyperparameters_is_refused_before_a_model_is_built(tmp_path, key, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "AutoModelForCausalLM", None)
    with refused("E-CKPT-GGUF-LACKS", InvalidCheckpoint) as refusal:
        open_checkpoint(write_case(tmp_path / "model.gguf", "llama", drop=[key]))
    assert f"llama.{key}" in refusal.error.what


def test_a_part_alone_that_is_called_a_whole_model_is_refused(tmp_path):
    """As if a part had been renamed by a program that drops its metadata too."""
    _, _, tensors = case("llama")
    path = write_gguf(tmp_path / "model.gguf", "llama", {}, dict(list(tensors.items())[5:]), {})
    with refused("E-CKPT-GGUF-LACKS", InvalidCheckpoint) as refusal:
        open_checkpoint(path)
    assert "llama.block_count" in refusal.error.what


@pytest.mark.parametrize("keys", [{"split.count": 1 << 31}, {"split.count": "two"}, {"split.count": [2, 2]},
                                  {"split.count": 2, "split.no": 2}, {"split.count": 2, "split.no": [0]}])
def test_senseless_numbers_of_parts_are_refused(tmp_path, keys):
    with refused("E-CKPT-GGUF-PARTS", InvalidCheckpoint):
        open_checkpoint(write_case(tmp_path / "model.gguf", "llama", tokens=keys))


@pytest.mark.whole_model
def test_an_export_of_parts_whose_tokenizer_cannot_be_converted(tmp_path):
    """Merges that name tokens which are not in the list; the note says that there is a tokenizer."""
    import gqa_export

    parts = parts_of(tmp_path / "parts", tokens={
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [f"t{number}" for number in range(61)],
        "tokenizer.ggml.merges": ["x y"], "tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.eot_token_id": 7})
    bundle = gqa_export.export(parts[3], tmp_path / "bundle", target="ort", dtype="fp32")
    assert any("has a tokenizer, which could not be converted" in note for note in bundle.exported.notes)
    assert not any("has no tokenizer" in note for note in bundle.exported.notes)
    assert bundle.manifest.tokens == {"eos": [3, 7], "bos": None, "pad": None, "tokenizer": False}


def test_one_file_of_one_part_is_a_whole_model(tmp_path):
    path = write_case(tmp_path / "model-00001-of-00001.gguf", "llama")
    assert read_gguf(path).files == (path,)
    assert open_checkpoint(path).config["num_hidden_layers"] == 2
