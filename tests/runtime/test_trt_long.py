"""An engine that approximates long prompts, over a pretended TensorRT: its pieces, its verdict, its refusals."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from gqa_models import write_tiny
from gqa_plugins.grouped_attention import tensorrt as plugin
from refusal import refused

from gqa_export.bundle.engine_facts import PluginFacts
from gqa_export.bundle.graph_file import read_graph
from gqa_export.bundle.long_facts import PREFILL
from gqa_export.bundle.manifest import read_manifest
from gqa_export.exporting.long_plan import LongOptions
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.lowering.tensorrt.interpret import interpret
from gqa_export.runtime.open_session import open_bundle
from gqa_export.runtime.tensorrt.session import EngineSession
from gqa_export.validation.stand_in import stand_in
from gqa_export.validation.validate import validate

from .engine_stand_in import KERNELS, Device, module, pretend_cuda, refacts, write_engine

LEAF = 32


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, Path]:
    """(checkpoint, bundle), whose layers all approximate."""
    folder = tmp_path_factory.mktemp("long")
    checkpoint = write_tiny("llama", folder / "llama", num_hidden_layers=2)
    options = LongOptions("tiles", "all", leaf=LEAF, heavy=32, samples=8, anchors=3)
    export_onnx(checkpoint, folder / "bundle", ExportOptions(target="trt-plugin", capacity=128, long=options))
    return checkpoint, folder / "bundle"


@pytest.fixture
def engine(exported, monkeypatch, tmp_path):
    """(max_prompt) -> the folder of an engine built of `prefill.onnx`, on a pretended GPU."""
    manifest, model, device = read_manifest(exported[1]), read_graph(exported[1] / PREFILL), Device()
    interpret(model)
    pretend_cuda(monkeypatch, device)
    monkeypatch.setattr("gqa_export.runtime.tensorrt.device.cuda_device", lambda number: torch.device("cpu"))
    monkeypatch.setattr(plugin, "register", lambda trt: None)
    facts = PluginFacts("GroupedQueryAttention", "2", "gqa", 1, hashlib.sha256(KERNELS).hexdigest())
    with stand_in(exported[1], manifest, model, "long") as (_, graph):
        def make(max_prompt: int) -> Path:
            folder = write_engine(tmp_path / f"engine{max_prompt}", graph, manifest, max_prompt=max_prompt,
                                  plugin=facts)
            monkeypatch.setattr("gqa_export.runtime.tensorrt.session.import_flavor",
                                lambda facts, where: module(device, folder))
            return folder

        yield make


def test_a_prompt_goes_in_pieces_that_end_at_leaves(engine) -> None:
    ids = np.random.default_rng(0).integers(3, 300, (1, 100))
    logits = []
    for longest in (128, 70):
        session = EngineSession.load(engine(longest))
        assert session.leaf == LEAF
        session.reset(1)
        logits.append(session.step(ids).logits)
    assert np.abs(logits[0] - logits[1]).max() <= 1e-4
    assert np.isfinite(logits[0]).all()


def test_it_is_validated_up_to_a_leaf_and_says_so(engine, exported) -> None:
    verdict = validate(engine(64), exported[0], steps=4)
    assert verdict.passed, str(verdict.first)
    assert any(f"leaf of {LEAF} tokens" in note for note in verdict.notes)
    assert max(max(case.prompt_lengths, default=0) + case.steps for case in verdict.cases) <= LEAF


def test_a_plugin_of_a_later_version_is_asked_for_and_exact_is_refused(engine) -> None:
    folder = engine(64)
    with refused("E-OPTION-ENGINE"):
        open_bundle(folder, exact=True)
    facts = read_manifest(folder).engine.plugin
    refacts(folder, plugin=PluginFacts(facts.name, "4", facts.namespace, 1, facts.sha256))
    with refused("E-ENGINE-PLUGIN") as found:
        EngineSession.load(folder)
    assert "version 4" in found.error.what
    assert "version 1, 2 and 3" in found.error.what
