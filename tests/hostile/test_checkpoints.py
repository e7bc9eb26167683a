"""Checkpoints made to do harm: nothing of theirs is run, nothing outside is read."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
from refusal import refused
from safetensors.torch import load_file

from gqa_export.bundle.manifest import DATA, MODEL
from gqa_export.checkpoint.load_config import load_config
from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.checkpoint.pickle_permission import Trust, trust, trusting
from gqa_export.checkpoint.pickle_weights import SINGLE
from gqa_export.errors import GqaExportError, InvalidCheckpoint, UnsupportedModel
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx

pytestmark = pytest.mark.whole_model


@pytest.fixture
def pickled(stolen) -> Path:
    """The same checkpoint, its weights in a pickle."""
    import torch

    torch.save(load_file(stolen / "model.safetensors"), stolen / SINGLE)
    (stolen / "model.safetensors").unlink()
    return stolen


class Harm:
    """A pickle that leaves a file behind when it is opened by an unrestricted unpickler."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self):
        return os.mkdir, (str(self.sign),)


def test_a_pickle_is_refused_unless_allowed_and_then_gives_the_same_bundle(pickled, bundle, tmp_path):
    with refused("E-CKPT-PICKLE", InvalidCheckpoint) as refusal:
        open_checkpoint(pickled)
    assert "--allow-pickle" in refusal.error.fix
    with trusting(Trust(pickle=True)):
        export_onnx(pickled, tmp_path / "out", ExportOptions(capacity=128))
    assert not trust().pickle
    for name in (MODEL, DATA):
        assert (tmp_path / "out" / name).read_bytes() == (bundle / name).read_bytes()


def test_the_option_is_off_by_default_at_the_command_line(pickled, tmp_path, program):
    done = program("onnx", pickled, "-o", tmp_path / "out", "--no-validate", "--capacity", 128)
    assert done.returncode == 2
    assert "--allow-pickle" in done.stderr
    done = program("onnx", pickled, "-o", tmp_path / "out", "--no-validate", "--capacity", 128, "--allow-pickle")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("archive", [True, False], ids=["in an archive", "plain"])
def test_code_in_an_allowed_pickle_is_not_run(pickled, tmp_path, archive):
    import torch

    if archive:
        torch.save({"model.norm.weight": Harm(tmp_path / "harm")}, pickled / SINGLE)
    else:
        (pickled / SINGLE).write_bytes(pickle.dumps({"model.norm.weight": Harm(tmp_path / "harm")}))
    with trusting(Trust(pickle=True)), refused("E-CKPT-PICKLE-CONTENT", InvalidCheckpoint):
        load_model(open_checkpoint(pickled), "float32")
    assert not (tmp_path / "harm").exists()


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(pickled):
    with zipfile.ZipFile(pickled / SINGLE, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    with trusting(Trust(pickle=True)), refused("E-CKPT-PICKLE-BOMB", InvalidCheckpoint):
        load_model(open_checkpoint(pickled), "float32")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04K\x01.", bytes(100)], ids=range(4))
def test_a_damaged_pickle_is_refused(pickled, content):
    (pickled / SINGLE).write_bytes(content)
    with trusting(Trust(pickle=True)), pytest.raises(GqaExportError):
        load_model(open_checkpoint(pickled), "float32")


@pytest.mark.parametrize(("shard", "code"), [("../secret.bin", "E-CKPT-INDEX"), ("/etc/hostname", "E-CKPT-INDEX"),
                                             (3, "E-CKPT-INDEX"), ("", "E-CKPT-SHARD-MISSING")])
def test_shards_outside_of_the_folder_are_refused(pickled, shard, code):
    (pickled / SINGLE).unlink()
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    (pickled / "pytorch_model.x.bin").write_bytes(b"")
    with trusting(Trust(pickle=True)), refused(code, InvalidCheckpoint):
        open_checkpoint(pickled)


@pytest.mark.parametrize("known", [True, False], ids=["a known architecture", "an unknown architecture"])
def test_code_that_comes_with_a_checkpoint_is_never_run(stolen, tmp_path, known):
    config = json.loads((stolen / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "harm.Config", "AutoModelForCausalLM": "harm.Model"},
               "model_type": config["model_type"] if known else "harmful"}
    (stolen / "config.json").write_text(json.dumps(config))
    (stolen / "harm.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'harm')!r})\n")
    opened = open_checkpoint(stolen)
    if known:
        assert type(load_model(opened, "float32")).__module__.startswith("transformers.")
    else:
        with refused("E-MODEL-UNKNOWN", UnsupportedModel):
            load_config(opened)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 10**9), ("vocab_size", 10**12), ("hidden_size", -1),
                                            ("num_attention_heads", "4"), ("head_dim", 10**30), ("vocab_size", 1e9)])
def test_absurd_sizes_are_refused_before_a_model_of_that_size_is_built(stolen, key, value):
    config = json.loads((stolen / "config.json").read_text())
    (stolen / "config.json").write_text(json.dumps({**config, key: value}))
    with refused("E-CKPT-CONFIG-VALUE", InvalidCheckpoint) as refusal:
        open_checkpoint(stolen)
    assert key in refusal.error.what


@pytest.mark.parametrize(("section", "key", "value"), [
    (("text_config",), "num_hidden_layers", 3_000_000), (("text_config",), "vocab_size", -1),
    (("thinker_config", "text_config"), "hidden_size", 10**12), (("vision_config",), "num_hidden_layers", 10**7),
    ((), "n_layers", 3_000_000), (("ffn_config",), "ffn_hidden_size", 10**10)])
def test_absurd_sizes_in_sections_of_the_configuration_are_refused_too(stolen, section, key, value):
    values = {key: value}
    for name in reversed(section):
        values = {name: values}
    config = json.loads((stolen / "config.json").read_text())
    (stolen / "config.json").write_text(json.dumps({**config, **values}))
    with refused("E-CKPT-CONFIG-VALUE", InvalidCheckpoint) as refusal:
        open_checkpoint(stolen, text_only=True)
    assert ".".join((*section, key)) in refusal.error.what


def test_a_configuration_that_does_not_fit_the_weights_is_refused(stolen):
    config = json.loads((stolen / "config.json").read_text())
    (stolen / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 40}))
    with refused("E-CKPT-TENSORS-MISSING", InvalidCheckpoint):
        load_model(open_checkpoint(stolen), "float32")
