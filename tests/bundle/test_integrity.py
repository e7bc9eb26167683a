"""Weights that a bundle shares with its checkpoint, and what happened to them after the export."""

from __future__ import annotations

import ast
import json
import os
import shutil
from pathlib import Path

import gqa_models
import pytest
from refusal import refused

import gqa_export
from gqa_export.bundle.integrity import check_files
from gqa_export.bundle.manifest import MANIFEST, read_manifest
from gqa_export.bundle.writer import writing_bundle
from gqa_export.errors import InvalidBundle
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.runtime.ort.session import OrtSession
from gqa_export.runtime.text import open_tokenizer
from gqa_export.validation.validate import validate

ROOT = Path(gqa_export.__file__).parent
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module", params=[("link", False), ("link", True), ("inplace", False), ("inplace", True)],
                ids=lambda param: f"{param[0]}-{'hashed' if param[1] else 'unhashed'}")
def exported(request, tmp_path_factory) -> tuple[Path, Path, bool]:
    """(checkpoint, bundle, whether the sha256 of the shared weights was recorded)."""
    mode, hashed = request.param
    root = tmp_path_factory.mktemp("shared")
    checkpoint = gqa_models.write_tiny("llama", root / "checkpoint")
    bundle = checkpoint if mode == "inplace" else root / "bundle"
    export_onnx(checkpoint, bundle, ExportOptions(weights=mode, hash_full=hashed))
    return checkpoint, bundle, hashed


@pytest.fixture
def shared(exported, tmp_path) -> tuple[Path, Path, bool]:
    """The same, in copies that keep the times."""
    checkpoint, bundle, hashed = exported
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    if bundle == checkpoint:
        return copy, copy, hashed
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint")), copy, hashed


def change_one_byte(path: Path) -> None:
    """As training on would: the same size, the same header."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def test_shared_weights_that_changed_after_the_export_are_refused_by_run_and_validate(shared):
    checkpoint, bundle, hashed = shared
    OrtSession.load(bundle, "cpu")
    change_one_byte(bundle / WEIGHTS)
    code = "E-BUNDLE-HASH" if hashed else "E-BUNDLE-MODIFIED"
    with refused(code, InvalidBundle):
        OrtSession.load(bundle, "cpu")
    with refused(code, InvalidBundle):
        validate(bundle, checkpoint, check_hashes=False)


def test_shared_weights_with_another_time_are_taken_only_where_a_hash_proves_them_unchanged(shared):
    _, bundle, hashed = shared
    os.utime(bundle / WEIGHTS, (1, 1))
    if hashed:
        check_files(bundle, read_manifest(bundle), hashes=False)
    else:
        with refused("E-BUNDLE-MODIFIED", InvalidBundle) as refusal:
            check_files(bundle, read_manifest(bundle), hashes=False)
        assert "--hash" in refusal.error.fix


@pytest.mark.parametrize("name", ["tokenization_own.py", "deep/er/x.PY", "__pycache__/x.cpython-311.pyc"])
def test_python_files_in_a_bundle_are_refused_listed_or_not(shared, name):
    checkpoint, bundle, _ = shared
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_text("raise SystemExit('executed')")
    with refused("E-BUNDLE-CODE", InvalidBundle):
        OrtSession.load(bundle, "cpu")
    with refused("E-BUNDLE-CODE", InvalidBundle):
        validate(bundle, checkpoint)


def test_nothing_is_exported_into_a_checkpoint_folder_that_holds_code(tmp_path):
    (tmp_path / "modeling_own.py").write_text("")
    with refused("E-BUNDLE-CODE", InvalidBundle), writing_bundle(tmp_path, inplace=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["modeling_own.py"]


def test_the_code_of_a_tokenizer_is_never_run_and_nobody_is_asked(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()\nclass Own: pass\n")
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with refused("E-BUNDLE-TOKENIZER", InvalidBundle):
        open_tokenizer(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_every_call_that_could_run_code_of_a_checkpoint_forbids_it():
    calls = [(path.name, node) for path in ROOT.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
             and node.func.attr in ("from_pretrained", "from_config") and isinstance(node.func.value, ast.Name)
             and node.func.value.id.startswith("Auto")]
    assert len(calls) > 5
    open_ones = [f"{name}:{node.lineno}" for name, node in calls if not any(
        key.arg == "trust_remote_code" and isinstance(key.value, ast.Constant) and key.value.value is False
        for key in node.keywords)]
    assert open_ones == []


@pytest.mark.parametrize("eos", [None, [None], "2", 2.5, {}])
def test_end_tokens_that_are_not_a_list_of_ids_are_refused(shared, eos):
    _, bundle, _ = shared
    data = json.loads((bundle / MANIFEST).read_text())
    data["tokens"]["eos"] = eos
    (bundle / MANIFEST).write_text(json.dumps(data))
    with refused("E-BUNDLE-MANIFEST", InvalidBundle):
        read_manifest(bundle)
