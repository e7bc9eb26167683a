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
import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from gqa_export.cli import main
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.trace import modelling_sources, trace_cache, tracing

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


def copy_of_transformers(root, *models):
    """Its shared modules and some of its models, to be edited."""
    installed = modelling_sources._installed()
    for folder in (".", "integrations", *(f"models/{model}" for model in models)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for path in (installed / folder).glob("*.py"):
            shutil.copy(path, root / folder)
    return root


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


@pytest.mark.parametrize("edited", ["models/llama/modeling_llama.py", "models/llama/configuration_llama.py",
                                    "masking_utils.py", "modeling_rope_utils.py"])
@pytest.mark.usefixtures("traces")
def test_an_edited_checkout_of_transformers_is_another_trace(tmp_path, monkeypatch, edited):
    root = copy_of_transformers(tmp_path / "transformers", "llama", "mistral")
    monkeypatch.setattr(modelling_sources, "_installed", lambda: root)
    config = {"model_type": "llama"}
    before = trace_cache.place_of(config, {})
    assert before == trace_cache.place_of(config, {})
    (root / "models/mistral/modeling_mistral.py").write_text("another model")
    assert before == trace_cache.place_of(config, {})
    with (root / edited).open("a") as file:
        file.write("# edited\n")
    assert before != trace_cache.place_of(config, {})


def test_what_a_model_inherits_from_and_the_models_inside_a_model_are_among_its_sources(tmp_path):
    root = copy_of_transformers(tmp_path / "transformers", "llama", "gemma3")
    child = root / "models/child"
    child.mkdir()
    (child / "configuration_child.py").write_text('class ChildConfig(C):\n    model_type = "child_of_llama"\n')
    (child / "modeling_child.py").write_text("from ..llama.modeling_llama import LlamaAttention\n")
    nested = {"model_type": "child_of_llama", "text_config": {"model_type": "gemma3_text"}}
    found = modelling_sources.modelling_sources(nested, root)
    assert found is not None
    names = {path.relative_to(root).as_posix() for path in found}
    assert names >= {"models/child/modeling_child.py", "models/llama/modeling_llama.py", "masking_utils.py",
                     "models/gemma3/modeling_gemma3.py", "models/gemma3/configuration_gemma3.py"}


@pytest.mark.usefixtures("traces")
def test_a_model_whose_sources_are_not_found_is_not_kept():
    assert trace_cache.place_of({"model_type": "from another place"}, {}) is None


def test_the_sources_of_every_tiny_model_are_found():
    lost = [name for name in gqa_models.tiny_names()
            if modelling_sources.modelling_sources(gqa_models.tiny_config(name)) is None]
    assert not lost


@pytest.mark.usefixtures("kept")
def test_an_export_without_the_trace_cache_neither_takes_nor_keeps_a_trace(tmp_path, first, traces):
    done, graph = export(first.folder, tmp_path / "a", trace_cache=False)
    assert not done.trace_kept
    assert graph == first.graph
    export(first.folder, tmp_path / "b", capacity=32, trace_cache=False)
    assert len(list(traces.iterdir())) == 1
    result = CliRunner().invoke(main, ["onnx", str(first.folder), "-o", str(tmp_path / "c"), "--no-trace-cache"])
    assert (result.exit_code, "every layer traced" in result.output) == (0, True), result.output


def test_a_kept_trace_that_fails_validation_is_traced_again_once_and_that_is_said(tmp_path, first, kept):
    traced = trace_cache.load(kept)
    epsilon = next(tensor for tensor in traced.model.graph.initializer if not tensor.external_data
                   and onnx.numpy_helper.to_array(tensor).size == 1 and 0 < onnx.numpy_helper.to_array(tensor) < 1e-3)
    wrong = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(epsilon) + np.float32(0.5), epsilon.name)
    epsilon.CopyFrom(wrong)
    trace_cache.keep(kept, traced)
    result = CliRunner().invoke(main, ["onnx", str(first.folder), "-o", str(tmp_path / "bundle")])
    assert result.exit_code == 0, result.output
    assert result.output.count("traced again") == 1
    assert "PASSED" in result.output
    assert (tmp_path / "bundle" / "model.onnx").read_bytes() == first.graph
    assert not kept.exists()


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
