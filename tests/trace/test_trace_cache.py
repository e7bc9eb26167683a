"""Are kept traces the traces they stand for, and is nothing else taken for one?"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gqa_models
import pytest

from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.trace import trace_cache, tracing

pytestmark = pytest.mark.whole_model


@pytest.fixture
def traces(tmp_path, monkeypatch):
    """An empty cache."""
    (tmp_path / "traces").mkdir()
    monkeypatch.setenv(trace_cache.FOLDER, str(tmp_path / "traces"))
    return tmp_path / "traces"


def export(folder, output, **options):
    done = export_onnx(folder, output, ExportOptions(**options))
    return done, (output / "model.onnx").read_bytes()


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A checkpoint (.folder), its first export (.done, .graph) and what that kept (.kept)."""
    folder = gqa_models.write_tiny("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=2)
    kept = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(trace_cache.FOLDER, str(kept))
        done, graph = export(folder, tmp_path_factory.mktemp("out") / "first")
    (trace,) = kept.iterdir()
    return SimpleNamespace(folder=folder, done=done, graph=graph, kept=trace)


@pytest.fixture
def kept(first, traces):
    """A copy of that trace in this test's cache."""
    return Path(shutil.copy(first.kept, traces))


class Traced(Exception):
    """A trace was about to be made."""


@pytest.fixture
def no_tracing(monkeypatch):
    def refuse(*_, **__):
        raise Traced

    monkeypatch.setattr(tracing, "trace", refuse)


@pytest.mark.usefixtures("kept", "no_tracing")
def test_the_second_export_takes_the_kept_trace_and_writes_the_same_graph(tmp_path, first):
    second, again = export(first.folder, tmp_path / "b")
    assert (first.done.trace_kept, second.trace_kept) == (False, True)
    assert first.graph == again
    assert first.done.manifest.spec == second.manifest.spec
    assert first.done.manifest.capacity == second.manifest.capacity == 512


def test_a_damaged_trace_is_traced_again(tmp_path, first, kept):
    kept.write_bytes(kept.read_bytes()[:-10])
    again, same = export(first.folder, tmp_path / "b")
    assert not again.trace_kept
    assert same == first.graph


@pytest.mark.usefixtures("kept", "no_tracing")
def test_a_changed_configuration_or_option_is_another_trace(tmp_path, first):
    for options in ({"capacity": 32}, {"cache": "static"}, {"logits": "last"}, {"dtype": "fp16"},
                    {"target": "trt-plugin"}):
        with pytest.raises(Traced):
            export(first.folder, tmp_path / "b", **options)
    folder = shutil.copytree(first.folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Traced):
        export(folder, tmp_path / "c")


@pytest.mark.usefixtures("kept")
def test_a_kept_trace_needs_no_pytorch(tmp_path, first):
    code = ("import sys\nfrom gqa_export.exporting.to_onnx import export_onnx\n"
            "done = export_onnx(sys.argv[1], sys.argv[2])\n"
            "print(done.trace_kept, 'torch' in sys.modules, 'transformers' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, str(first.folder), str(tmp_path / "b")], capture_output=True,
                          text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]


def test_the_cache_can_be_switched_off_and_defaults_to_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(trace_cache.FOLDER, "off")
    assert trace_cache.folder() is None
    monkeypatch.delenv(trace_cache.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert trace_cache.folder() == tmp_path / "gqa-export" / "traces"


def test_the_oldest_traces_go_when_there_are_too_many(monkeypatch, first, traces, kept):
    monkeypatch.setattr(trace_cache, "KEPT", 2)
    for age, name in ((100, "x"), (50, "y")):
        (traces / f"{name}.trace").write_bytes(b"old")
        os.utime(traces / f"{name}.trace", (kept.stat().st_mtime - age,) * 2)
    traced = trace_cache.load(kept)
    trace_cache.keep(traces / "new.trace", traced)
    assert {path.name for path in traces.iterdir()} == {kept.name, "new.trace"}
    assert trace_cache.load(traces / "new.trace") == traced


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(tmp_path, monkeypatch, first):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(trace_cache.FOLDER, str(tmp_path / "file" / "traces"))
    done, graph = export(first.folder, tmp_path / "a")
    assert not done.trace_kept
    assert graph == first.graph
