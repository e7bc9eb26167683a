"""Weights that a folder holds twice are the same, or the checkpoint is refused, naming both places."""

from __future__ import annotations

import json

import pytest
import torch
from gqa_models import write_tiny
from refusal import refused
from safetensors.torch import load_file, save_file

from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.checkpoint.pickle_permission import Trust, trusting
from gqa_export.errors import InvalidCheckpoint

FORMATS = {"safetensors": ("model", "safetensors"), "pickle": ("pytorch_model", "bin")}
NAME = "model.layers.0.mlp.up_proj.weight"


class Folder:
    """A tiny checkpoint whose weights are written as a test wants them."""

    def __init__(self, place, form: str) -> None:
        self.place, (self.stem, self.ending) = write_tiny("llama", place, num_hidden_layers=1), FORMATS[form]
        self.tensors = load_file(place / "model.safetensors")
        (place / "model.safetensors").unlink()

    def write(self, name: str, tensors) -> None:
        if self.ending == "safetensors":
            save_file(tensors, self.place / name, metadata={"format": "pt"})
        else:
            torch.save(tensors, self.place / name)

    def single(self, tensors=None) -> None:
        self.write(f"{self.stem}.{self.ending}", tensors or self.tensors)

    def shards(self, tensors=None, second=None) -> list[str]:
        """Two shards and their index. second: more tensors for the second shard."""
        tensors = tensors or self.tensors
        names = sorted(tensors)
        parts = names[::2], names[1::2]
        files = [f"{self.stem}-{n}-of-00002.{self.ending}" for n in ("00001", "00002")]
        for file, part in zip(files, parts):
            self.write(file, {name: tensors[name] for name in part} | ((second or {}) if file == files[1] else {}))
        place = {name: file for file, part in zip(files, parts) for name in part}
        index = self.place / f"{self.stem}.{self.ending}.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": place}))
        return files

    def changed(self) -> dict:
        return {**self.tensors, NAME: self.tensors[NAME] * 1.001}

    def open(self):
        with trusting(Trust(pickle=self.ending == "bin")):
            return open_checkpoint(self.place)

    def load(self):
        with trusting(Trust(pickle=self.ending == "bin")):
            return load_model(open_checkpoint(self.place), "fp32").state_dict()


@pytest.fixture(params=FORMATS)
def folder(tmp_path, request):
    return Folder(tmp_path / "checkpoint", request.param)


def test_a_single_file_beside_equal_shards_opens(folder):
    folder.single()
    folder.shards()
    assert torch.equal(folder.load()[NAME], folder.tensors[NAME])


@pytest.mark.parametrize("change", ["value", "only in the file", "only in the shards"])
def test_a_single_file_beside_other_shards_is_refused_naming_both(folder, change):
    lacking = {name: tensor for name, tensor in folder.tensors.items() if name != NAME}
    folder.single(folder.changed() if change == "value" else lacking if change == "only in the shards" else None)
    folder.shards(lacking if change == "only in the file" else None)
    with refused("E-CKPT-TWO-CHECKPOINTS", InvalidCheckpoint) as refusal:
        folder.open()
    assert all(word in refusal.error.what for word in (NAME, f"{folder.stem}.{folder.ending}", "index.json"))


def test_a_single_file_beside_an_index_without_its_shards_opens(folder):
    folder.single()
    for file in folder.shards(folder.changed()):
        (folder.place / file).unlink()
    assert torch.equal(folder.load()[NAME], folder.tensors[NAME])


def test_a_single_file_beside_one_stale_shard_of_two_is_refused(folder):
    folder.single()
    files = folder.shards(folder.changed())
    named = json.loads((folder.place / f"{folder.stem}.{folder.ending}.index.json").read_text())["weight_map"]
    (folder.place / next(file for file in files if file != named[NAME])).unlink()
    with refused("E-CKPT-TWO-CHECKPOINTS", InvalidCheckpoint):
        folder.open()


@pytest.mark.parametrize("listed", [True, False])
def test_a_tensor_in_two_shards_is_the_same_or_refused_naming_both(folder, listed):
    name = sorted(folder.tensors)[0]  # of the first shard
    index = folder.place / f"{folder.stem}.{folder.ending}.index.json"
    for factor in (1, 1.001):
        folder.shards(second={name: folder.tensors[name] * factor})
        if not listed:
            named = json.loads(index.read_text())
            del named["weight_map"][name]
            index.write_text(json.dumps(named))
        if factor == 1:
            assert torch.equal(folder.load()[name], folder.tensors[name])
    with refused("E-CKPT-TENSOR-TWICE", InvalidCheckpoint) as refusal:
        folder.load()
    assert name in refusal.error.what
    assert refusal.error.what.count("-of-00002") == 2
