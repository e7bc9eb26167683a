"""Are kept traces the traces they stand for, and is nothing else taken for one?"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import gqa_models
import pytest

from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.trace import trace_cache


@pytest.fixture
def traces(tmp_path, monkeypatch):
    monkeypatch.setenv(trace_cache.FOLDER, str(tmp_path / "traces"))
    return tmp_path / "traces"


def export(folder, output, **options):
    done = export_onnx(folder, output, ExportOptions(**options))
    return done, (output / "model.onnx").read_bytes()


def test_the_second_export_takes_the_kept_trace_and_writes_the_same_graph(tmp_path, traces):
    folder = gqa_models.write_tiny("llama", tmp_path / "llama")
    first, graph = export(folder, tmp_path / "a")
    second, again = export(folder, tmp_path / "b")
    assert (first.trace_kept, second.trace_kept) == (False, True)
    assert graph == again
    assert first.manifest.spec == second.manifest.spec
    assert first.manifest.capacity == second.manifest.capacity == 512
    assert len(list(traces.iterdir())) == 1


def test_a_damaged_trace_is_traced_again(tmp_path, traces):
    folder = gqa_models.write_tiny("llama", tmp_path / "llama")
    _, graph = export(folder, tmp_path / "a")
    (kept,) = traces.iterdir()
    kept.write_bytes(kept.read_bytes()[:-10])
    again, same = export(folder, tmp_path / "b")
    assert not again.trace_kept
    assert same == graph


def test_a_changed_configuration_or_option_is_another_trace(tmp_path, traces):
    folder = gqa_models.write_tiny("llama", tmp_path / "llama")
    export(folder, tmp_path / "a")
    assert not export(folder, tmp_path / "b", capacity=32)[0].trace_kept
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (folder / "config.json").write_text(json.dumps(config))
    assert not export(folder, tmp_path / "c")[0].trace_kept


def test_a_kept_trace_needs_no_pytorch(tmp_path, traces):
    folder = gqa_models.write_tiny("llama", tmp_path / "llama")
    export(folder, tmp_path / "a")
    code = ("import sys\nfrom gqa_export.exporting.to_onnx import export_onnx\n"
            "done = export_onnx(sys.argv[1], sys.argv[2])\n"
            "print(done.trace_kept, 'torch' in sys.modules, 'transformers' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "b")], capture_output=True,
                          text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]


def test_the_cache_can_be_switched_off_and_defaults_to_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(trace_cache.FOLDER, "off")
    assert trace_cache.folder() is None
    monkeypatch.delenv(trace_cache.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert trace_cache.folder() == tmp_path / "gqa-export" / "traces"


def test_the_oldest_traces_go_when_there_are_too_many(tmp_path, monkeypatch, traces):
    monkeypatch.setattr(trace_cache, "KEPT", 2)
    folder = gqa_models.write_tiny("llama", tmp_path / "llama")
    export(folder, tmp_path / "a")
    (first,) = traces.iterdir()
    for age, name in ((100, "x"), (50, "y")):
        (traces / f"{name}.trace").write_bytes(b"old")
        os.utime(traces / f"{name}.trace", (first.stat().st_mtime - age,) * 2)
    export(folder, tmp_path / "b", capacity=32)
    assert len(list(traces.glob("*.trace"))) == 2
    assert first.exists()
    assert not (traces / "x.trace").exists()


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(trace_cache.FOLDER, str(tmp_path / "file" / "traces"))
    done, _ = export(gqa_models.write_tiny("llama", tmp_path / "llama"), tmp_path / "a")
    assert not done.trace_kept
