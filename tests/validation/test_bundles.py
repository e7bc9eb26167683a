"""Real bundles of tiny models: good ones pass, damaged ones are caught, and the exit code says which is which."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from gqa_models import write_tiny
from refusal import refused

from gqa_export.bundle.manifest import DATA, MANIFEST, MODEL, FileFact, read_manifest
from gqa_export.errors import GqaExportError, NotCheckedHere
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.files.sha256 import file_sha256
from gqa_export.report.baseline import key_of
from gqa_export.validation.validate import validate

pytestmark = pytest.mark.whole_model

STEPS = 6


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """name -> the folder of a tiny checkpoint, written once."""
    made: dict[tuple, Path] = {}

    def get(name: str, dtype: str = "float32") -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = write_tiny(name, tmp_path_factory.mktemp("ck"), dtype=dtype)
        return made[name, dtype]

    return get


@pytest.fixture(scope="module")
def bundles(checkpoints, tmp_path_factory):
    """(name, options) -> the folder of a bundle, exported once. Copy it before changing it."""
    made: dict[tuple, Path] = {}

    def get(name: str, stored: str = "float32", **options) -> Path:
        key = (name, stored, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("b") / "bundle"
            export_onnx(checkpoints(name, stored), made[key], ExportOptions(**{"capacity": 128, **options}))
        return made[key]

    return get


def broken(bundle: Path, folder: Path, change) -> Path:
    """A copy of a bundle whose graph was changed by someone who also wrote the manifest."""
    shutil.copytree(bundle, folder)
    model = onnx.load(str(folder / MODEL), load_external_data=False)
    change(model)
    onnx.save(model, str(folder / MODEL))
    sign(folder)
    return folder


def sign(folder: Path) -> None:
    """Make the manifest's hashes and sizes true again."""
    manifest = read_manifest(folder)
    files = {name: FileFact((folder / name).stat().st_size, file_sha256(folder / name)) for name in manifest.files}
    (folder / MANIFEST).write_text(replace(manifest, files=files).to_json())


def attention(model, layer: int):
    nodes = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    return {attribute.name: attribute for attribute in nodes[layer].attribute}, nodes[layer]


def scale_of_layer_1(model):
    attention(model, 1)[0]["scale"].f *= 1.01


def window_one_longer(model):
    attention(model, 0)[0]["local_window_size"].i += 1


def window_dropped(model):
    for layer in range(3):
        attention(model, layer)[0]["local_window_size"].i = -1


def softcap_dropped(model):
    for layer in range(3):
        attention(model, layer)[0]["softcap"].f = 0


def rotary_interleaved(model):
    attention(model, 0)[0]["rotary_interleaved"].i = 1


def swapped_presents(model):
    """Layer 1's key cache is written where layer 2's belongs."""
    names = {"present.1.key": "present.2.key", "present.2.key": "present.1.key"}
    for node in model.graph.node:
        for i, name in enumerate(node.output):
            node.output[i] = names.get(name, name)


def one_weight(folder: Path) -> None:
    """Change a stored number a little, and make the manifest agree."""
    data = bytearray((folder / DATA).read_bytes())
    values = np.frombuffer(data, np.float32).copy()
    values[np.abs(values).argmax()] *= 1.05
    (folder / DATA).write_bytes(values.tobytes())
    sign(folder)


@pytest.mark.parametrize(("name", "target", "cache"), [  # every mechanism and target: tests/export
    ("llama", "ort", "growing"), ("mistral", "onnx", "static"), ("stablelm", "portable", "static")])
def test_an_exported_bundle_passes(bundles, checkpoints, name, target, cache):
    verdict = validate(bundles(name, target=target, cache=cache), checkpoints(name), steps=STEPS)
    assert verdict.passed, str(verdict.first)
    whole_row = ["whole_row_mask"] if target == "ort" else []
    assert [case.name for case in verdict.cases] == ["teacher_forced", "free_running", "ragged", *whole_row,
                                                     "garbage_tail", "last_slots", "special",
                                                     *(["in_place"] if cache == "growing" else []), "refusals"]
    # far below: the bound is a few times PyTorch's own rounding
    assert verdict.max_abs_logits < 1e-4


def test_a_bundle_with_only_the_last_logits_passes(bundles, checkpoints):
    verdict = validate(bundles("llama", logits="last"), checkpoints("llama"), steps=STEPS)
    assert verdict.passed, str(verdict.first)


@pytest.mark.parametrize(("change", "name", "place"), [
    (rotary_interleaved, "llama", "layer 0 key"), (swapped_presents, "llama", "layer 1 key"),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_graph_is_caught_and_the_place_named(bundles, checkpoints, tmp_path, change, name, place):
    folder = broken(bundles(name, target="ort"), tmp_path / "b", change)
    verdict = validate(folder, checkpoints(name), steps=STEPS)
    assert not verdict.passed
    assert verdict.first.output == place, str(verdict.first)


@pytest.mark.parametrize(("change", "name", "place"), [
    (scale_of_layer_1, "llama", "layer 1: scale"), (window_one_longer, "mistral", "layer 0: window"),
    (window_dropped, "mistral", "layer 0: window"), (softcap_dropped, "gemma2", "layer 0: softcap"),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_graph_that_contradicts_its_manifest_is_refused_by_layer(bundles, checkpoints, tmp_path, change, name, place):
    folder = broken(bundles(name, target="ort"), tmp_path / "b", change)
    with refused("E-BUNDLE-CLAIM") as refusal:
        validate(folder, checkpoints(name), steps=STEPS)
    assert place in refusal.error.what


def test_one_changed_weight_is_caught(bundles, checkpoints, tmp_path):
    shutil.copytree(bundles("llama", target="ort"), tmp_path / "b")
    one_weight(tmp_path / "b")
    assert not validate(tmp_path / "b", checkpoints("llama"), steps=STEPS).passed


def test_a_baseline_knows_a_bundle_by_its_checkpoint_not_by_its_folder(bundles, checkpoints, tmp_path):
    """Two checkpoints of one architecture in folders of one name; and the first again, copied elsewhere."""
    other = write_tiny("llama", tmp_path / "b", seed=7)
    export_onnx(other, tmp_path / "bundle", ExportOptions(capacity=128))
    shutil.copytree(checkpoints("llama"), tmp_path / "copy")
    found = [validate(bundle, against, steps=1) for bundle, against in (
        (bundles("llama"), checkpoints("llama")), (tmp_path / "bundle", other),
        (bundles("llama"), tmp_path / "copy"))]
    assert Path(found[0].bundle).name == Path(found[1].bundle).name
    assert key_of(found[0]) != key_of(found[1])
    assert key_of(found[0]) == key_of(found[2])


@pytest.mark.parametrize("dtype", ["bf16"])
def test_a_low_precision_bundle_is_checked_as_its_fp32_twin(bundles, checkpoints, dtype):
    folder = bundles("llama", target="portable", dtype=dtype)
    verdict = validate(folder, checkpoints("llama"), as_dtype="fp32", steps=STEPS)
    assert verdict.passed, str(verdict.first)
    assert verdict.checked_dtype == "float32"
    assert verdict.dtype != "float32"
    assert verdict.max_abs_logits < 1e-4  # the reference has the same rounded weights


def test_the_twin_of_a_wrong_graph_is_wrong_too(bundles, checkpoints, tmp_path):
    folder = broken(bundles("llama", target="ort", dtype="bf16", provider="cpu"), tmp_path / "b", swapped_presents)
    assert not validate(folder, checkpoints("llama"), as_dtype="fp32", steps=STEPS).passed


def test_bf16_on_a_cpu_is_not_checked_and_never_a_pass(bundles, checkpoints):
    with refused("E-ENV-KERNELS", NotCheckedHere) as refusal:
        validate(bundles("llama", target="portable", dtype="bf16"), checkpoints("llama"), provider="cpu")
    assert refusal.error.exit_code == 3
    assert "--dtype fp32" in refusal.error.fix
    assert "--as fp32" in refusal.error.fix


@pytest.mark.parametrize(("other", "named"), [("qwen3", "qwen3"), ("llama_mha", "key 0")])
def test_a_bundle_of_another_checkpoint_is_refused_by_name(bundles, checkpoints, other, named):
    with pytest.raises(GqaExportError, match=named) as caught:
        validate(bundles("llama", target="ort"), checkpoints(other))
    assert caught.value.exit_code == 2


def test_a_changed_file_is_refused_by_name(bundles, checkpoints, tmp_path):
    shutil.copytree(bundles("llama", target="ort"), tmp_path / "b")
    data = bytearray((tmp_path / "b" / DATA).read_bytes())
    data[1000] ^= 1
    (tmp_path / "b" / DATA).write_bytes(data)
    with refused("E-BUNDLE-HASH") as hashed:
        validate(tmp_path / "b", checkpoints("llama"))
    (tmp_path / "b" / DATA).write_bytes(data[:-4])
    with refused("E-BUNDLE-FILE-SIZE") as cut:
        validate(tmp_path / "b", checkpoints("llama"))
    (tmp_path / "b" / DATA).unlink()
    with refused("E-BUNDLE-FILE") as gone:
        validate(tmp_path / "b", checkpoints("llama"))
    assert all(DATA in refusal.error.what for refusal in (hashed, cut, gone))


def test_a_manifest_that_names_files_outside_is_refused(bundles, checkpoints, tmp_path):
    shutil.copytree(bundles("llama", target="ort"), tmp_path / "b")
    manifest = read_manifest(tmp_path / "b")
    (tmp_path / "secret").write_bytes(b"1")
    text = replace(manifest, files={**manifest.files, "../secret": FileFact(1)}).to_json()
    (tmp_path / "b" / MANIFEST).write_text(text)
    with refused("E-BUNDLE-OUTSIDE"):
        validate(tmp_path / "b", checkpoints("llama"))


def cold(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "gqa_export", "validate", *map(str, arguments)],
                          capture_output=True, text=True, timeout=300, check=False)


def test_exit_code_0_when_it_passed_and_json_and_junit_say_so(bundles, checkpoints, tmp_path):
    done = cold(bundles("llama", target="ort"), "--against", checkpoints("llama"), "--steps", STEPS,
                   "--json", tmp_path / "v.json", "--junit", tmp_path / "v.xml")
    assert done.returncode == 0, done.stderr
    assert "PASSED: max |logit difference|" in done.stdout
    assert done.stderr == ""  # no progress where there is no terminal
    assert json.loads((tmp_path / "v.json").read_text())["passed"] is True
    assert 'failures="0"' in (tmp_path / "v.xml").read_text()


def test_exit_code_1_when_outputs_differ(bundles, checkpoints, tmp_path, program):
    folder = Path(shutil.copytree(bundles("llama", target="ort"), tmp_path / "b"))
    one_weight(folder)
    done = program("validate", folder, "--against", checkpoints("llama"), "--steps", STEPS)
    assert done.returncode == 1, done.stderr
    assert "first divergence: case teacher_forced, step 0 (prefill), layer" in done.stdout


def test_exit_code_2_when_the_graph_is_not_what_its_manifest_says(bundles, checkpoints, tmp_path, program):
    folder = broken(bundles("llama", target="ort"), tmp_path / "b", scale_of_layer_1)
    done = program("validate", folder, "--against", checkpoints("llama"), "--steps", STEPS)
    assert done.returncode == 2
    assert "layer 1: scale is 0.2525 in the graph, 0.25 in the manifest" in done.stderr


def test_exit_code_2_for_bad_input(bundles, tmp_path, program):
    done = program("validate", bundles("llama", target="ort"), "--against", tmp_path / "nowhere")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "fix:" in done.stderr


def test_exit_code_3_for_what_cannot_be_checked_here(bundles, checkpoints, program):
    done = program("validate", bundles("llama", target="portable", dtype="bf16"), "--against", checkpoints("llama"),
                   "--provider", "cpu")
    assert done.returncode == 3
    assert "PASSED" not in done.stdout
    assert "--as fp32" in done.stderr


def test_a_linked_weight_file_whose_sha256_was_not_recorded_is_told_as_such(bundles, checkpoints, tmp_path):
    checkpoint = shutil.copytree(checkpoints("llama"), tmp_path / "checkpoint")
    for name, recorded in (("plain", False), ("hashed", True)):
        export_onnx(checkpoint, tmp_path / name, ExportOptions(capacity=64, weights="link", hash_full=recorded))
        notes = validate(tmp_path / name, checkpoint, steps=2, full_hash=True).notes
        assert not any("--hash computes all" in note for note in notes)
        assert any("no sha256 of model.safetensors" in note for note in notes) != recorded


def test_force_names_the_files_of_others_that_it_removes(checkpoints, tmp_path):
    folder = tmp_path / "bundle"
    options = ExportOptions(capacity=64)
    assert not any("removed" in note for note in export_onnx(checkpoints("llama"), folder, options).notes)
    (folder / "sub").mkdir()
    for name in ("notes.txt", "sub/more.csv"):
        (folder / name).write_text("mine")
    with refused("E-FILE-NOT-EMPTY") as refusal:
        export_onnx(checkpoints("llama"), folder, options)
    assert "notes.txt, sub/more.csv" in refusal.error.fix
    assert (folder / "notes.txt").exists()
    notes = export_onnx(checkpoints("llama"), folder, replace(options, force=True)).notes
    assert any("notes.txt, sub/more.csv" in note for note in notes)
    notes = export_onnx(checkpoints("llama"), folder, replace(options, force=True)).notes
    assert not any("removed" in note for note in notes)
