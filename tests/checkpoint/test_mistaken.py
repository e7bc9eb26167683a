"""What a newcomer gives in place of a checkpoint, or of a bundle: each is named for what it is, with what to give."""

from __future__ import annotations

import json

import pytest
from gqa_models import write_tiny
from refusal import refused

from gqa_export.bundle.manifest import read_manifest
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.errors import InvalidBundle, InvalidCheckpoint
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2471645608\n"


@pytest.fixture
def folder(tmp_path):
    return write_tiny("llama", tmp_path / "llama")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "model.engine"])
def test_an_exported_file_is_no_checkpoint(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x08\x0a")
    with refused("E-CKPT-EXPORTED", InvalidCheckpoint):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_one_file_of_weights_names_the_folder_that_holds_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02")
    with refused("E-CKPT-ONE-FILE", InvalidCheckpoint) as refusal:
        open_checkpoint(tmp_path / name)
    assert str(tmp_path) in refusal.error.fix


def test_a_bundle_names_the_checkpoint_that_it_came_from(folder, tmp_path):
    export_onnx(folder, tmp_path / "bundle")
    with refused("E-CKPT-EXPORTED", InvalidCheckpoint) as refusal:
        open_checkpoint(tmp_path / "bundle")  # with the checkpoint's config.json in it
    assert str(folder) in refusal.error.fix
    (tmp_path / "bundle" / "config.json").unlink()
    with refused("E-CKPT-EXPORTED", InvalidCheckpoint):
        open_checkpoint(tmp_path / "bundle")


def test_a_checkpoint_with_a_graph_beside_it_is_still_a_checkpoint(folder):
    export_onnx(folder, folder, ExportOptions(weights="inplace"))
    assert open_checkpoint(folder).tensors
    (folder / "model.safetensors").rename(folder / "moved.safetensors")
    with refused("E-CKPT-NO-WEIGHTS", InvalidCheckpoint) as refusal:  # not: it is a bundle, give the folder itself
        open_checkpoint(folder)
    assert "moved.safetensors" in refusal.error.what


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_clone_without_git_lfs_is_recognized(folder, name):
    (folder / name).write_text(POINTER)
    with refused("E-CKPT-GIT-LFS", InvalidCheckpoint) as refusal:
        open_checkpoint(folder)
    assert "git lfs pull" in refusal.error.fix
    assert name in refusal.error.where


def test_a_gguf_file_that_is_a_pointer_is_recognized(tmp_path):
    (tmp_path / "model.gguf").write_text(POINTER)
    with refused("E-CKPT-GIT-LFS", InvalidCheckpoint):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize("inner", ["snapshots/abc", "checkpoint-500", "final"])
def test_a_folder_around_the_checkpoint_names_the_one_inside(tmp_path, inner):
    (tmp_path / inner).mkdir(parents=True)
    (tmp_path / inner / "config.json").write_text("{}")
    with refused("E-CKPT-NO-CONFIG", InvalidCheckpoint) as refusal:
        open_checkpoint(tmp_path)
    assert str(tmp_path / inner) in refusal.error.fix


@pytest.mark.parametrize(("names", "word"), [
    (("consolidated.safetensors",), "consolidated.safetensors"),
    (tuple(f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)), "and 2 more")])
def test_weights_under_other_names_are_listed(folder, names, word):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(whole)
    with refused("E-CKPT-NO-WEIGHTS", InvalidCheckpoint) as refusal:
        open_checkpoint(folder)
    assert word in refusal.error.what


def test_a_checkpoint_quantized_by_mlx_is_named(folder):
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization": {"group_size": 64, "bits": 4}}))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"] = torch.ones(4, 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with refused("E-CKPT-MLX", InvalidCheckpoint) as refusal:
        open_checkpoint(folder)
    assert "4 bits" in refusal.error.what


def test_an_adapter_saved_as_a_whole_model_is_named(folder):
    from safetensors.torch import load_file, save_file

    tensors = {f"base_model.model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with refused("E-CKPT-ADAPTER", InvalidCheckpoint) as refusal:
        open_checkpoint(folder)
    assert "merge" in refusal.error.fix


def test_a_file_of_a_bundle_names_the_bundles_folder(folder, tmp_path):
    export_onnx(folder, tmp_path / "bundle")
    with refused("E-BUNDLE-FOLDER", InvalidBundle) as refusal:
        read_manifest(tmp_path / "bundle" / "model.onnx")
    assert str(tmp_path / "bundle") in refusal.error.fix


@pytest.mark.parametrize("force", [False, True])
def test_the_checkpoints_own_folder_is_no_output_with_or_without_force(folder, force):
    before = sorted(path.name for path in folder.iterdir())
    with refused("E-OPTION-OUTPUT-IS-CHECKPOINT") as refusal:
        export_onnx(folder, folder, ExportOptions(force=force))
    assert "--force" not in refusal.error.fix
    assert sorted(path.name for path in folder.iterdir()) == before
