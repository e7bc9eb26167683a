"""`validate` in one process of torchrun: the logits of all ranks, and this rank's own keys and values, are compared.

No engine runs on this machine: the merged graph of all ranks stands in for them, and shows what one rank has of it.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gqa_models import write_tiny

from gqa_export.bundle.engine_facts import ENGINE, EngineFacts
from gqa_export.bundle.manifest import MANIFEST, FileFact, read_manifest
from gqa_export.bundle.rank_view import rank_manifest
from gqa_export.engine.inspect_build import expected_aliases
from gqa_export.engine.profiles import make_profiles
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.files.sha256 import file_sha256
from gqa_export.progress import silent
from gqa_export.validation import validate as module
from gqa_export.validation.reference import open_reference, runnable
from gqa_export.validation.sessions import bundle_session

pytestmark = pytest.mark.whole_model

RANKS = 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny("llama", tmp_path_factory.mktemp("ck") / "ck", num_hidden_layers=1, num_attention_heads=4,
                      num_key_value_heads=2, head_dim=8)


@pytest.fixture(scope="module")
def graphs(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("b") / "graphs"
    export_onnx(checkpoint, folder, ExportOptions(target="trt-native", dtype="fp32", capacity=48, weights="copy",
                                                  tensor_parallel=RANKS))
    return folder


@pytest.fixture(scope="module")
def engines(graphs, tmp_path_factory):
    """The manifest of an engine bundle, beside graphs."""
    folder = shutil.copytree(graphs, tmp_path_factory.mktemp("e") / "engines")
    manifest = read_manifest(folder)
    facts = EngineFacts("rtx", "1.7", (), "native", make_profiles(manifest, 4, 32), expected_aliases(manifest))
    files = dict(manifest.files)
    for rank in manifest.parallel.ranks:
        engine = folder / rank.folder / ENGINE
        engine.write_bytes(b"opened by nobody")
        files[f"{rank.folder}/{ENGINE}"] = FileFact(engine.stat().st_size, file_sha256(engine))
    (folder / MANIFEST).write_text(replace(manifest, engine=facts, files=files).to_json())
    return folder


@pytest.fixture(scope="module")
def reference(checkpoint, graphs):
    return open_reference(checkpoint, read_manifest(graphs), "float32", [])


class OneRank:
    """What a rank's session shows of the merged graph's: logits, and keys and values of some heads."""

    def __init__(self, session: Any, spec: Any, heads: slice) -> None:
        self._session, self._heads, self.spec = session, heads, spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def cache(self) -> Any:
        return [tuple(each[:, self._heads] for each in pair) for pair in self._session.cache()]

    def step(self, *arguments: Any, **options: Any) -> Any:
        step = self._session.step(*arguments, **options)
        if step.keys is None:
            return step
        return replace(step, **{name: tuple(each[:, self._heads] for each in getattr(step, name))
                                for name in ("keys", "values")})


def validated(engines: Path, checkpoint: Path, reference: Any, monkeypatch, rank: int, shown: int):
    """The verdict of a rank whose engine shows the heads of rank `shown`."""
    manifest = read_manifest(engines)
    own = rank_manifest(manifest, rank).spec
    count = own.layers[0].kv_num_heads
    monkeypatch.setenv("RANK", str(rank))
    with ExitStack() as stack:
        def load(folder, provider, as_dtype):
            graph = replace(manifest, engine=None)
            ran, where, target = runnable(stack, folder, graph, "float32", [], silent)
            session, fill = stack.enter_context(bundle_session(where, ran, "cpu", [], target))
            return OneRank(session, own, slice(shown * count, (shown + 1) * count)), fill

        monkeypatch.setattr(module, "load_engine", load)
        return module.validate(engines, checkpoint, steps=2, reference=reference)


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_rank_compares_its_own_heads(engines, checkpoint, reference, monkeypatch, rank) -> None:
    verdict = validated(engines, checkpoint, reference, monkeypatch, rank, rank)
    assert verdict.passed, verdict.first
    assert {kind.kind for case in verdict.cases for kind in case.kinds} >= {"logits", "keys", "values"}


def test_the_heads_of_another_rank_are_noticed(engines, checkpoint, reference, monkeypatch) -> None:
    assert not validated(engines, checkpoint, reference, monkeypatch, 0, 1).passed
