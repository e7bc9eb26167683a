"""The engine part of scripts/gpu_check.py without a GPU: what it says of engines that pass, fail and refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from evidence import gpu_benchmark
from evidence.gpu_benchmark import try_engines

from gqa_export.bundle.engine_facts import EngineFacts
from gqa_export.errors import GqaExportError, NotCheckedHere

from .test_build import MANIFEST

FACTS = EngineFacts("rtx", "1.7", (89,), "plugin", (), {}, build={"seconds": 2.0, "weight_bytes_read": 90_000_000})


@pytest.fixture
def asked(monkeypatch) -> list:
    """What is built, by nothing."""
    built: list = []

    def make_engine(checkpoint, folder, options, report):
        built.append((checkpoint, folder.name, options))
        return SimpleNamespace(folder=folder, facts=FACTS, manifest=replace(MANIFEST, engine=FACTS))

    monkeypatch.setattr(gpu_benchmark, "make_engine", make_engine)
    monkeypatch.setattr(gpu_benchmark, "is_there", lambda flavor: flavor == "rtx")
    return built


def run(tmp_path: Path, check=lambda *_: (True, "largest difference 0"), clock=lambda *_: 0.5, **extra) -> list[dict]:
    return try_engines("CK", tmp_path, 200.0, check=check, clock=clock, say=lambda text: None, **extra)


def test_every_installed_library_is_tried_with_the_plugin_and_without(asked, tmp_path) -> None:
    rows = run(tmp_path)
    assert [(row["flavor"], row["attention"], row["passed"]) for row in rows] == [
        ("rtx", "plugin", True), ("rtx", "native", True)]
    assert [options.capabilities for _, _, options in asked] == [("current",)] * 2
    assert [folder for _, folder, _ in asked] == ["rtx-plugin", "rtx-native"]
    cache = MANIFEST.spec.cache_bytes_per_token(2) * rows[0]["length"]
    assert rows[0]["of_copy"] == pytest.approx((90_000_000 + cache) / 0.5e-3 / 200e9)
    assert rows[0]["tokens_s"] == 2000


def test_an_engine_that_differs_is_a_failure_with_its_figure(asked, tmp_path) -> None:
    rows = run(tmp_path, check=lambda *_: (False, "largest difference 3"), quick=True)
    assert [(row["passed"], row["note"]) for row in rows] == [(False, "largest difference 3")] * 2


@pytest.mark.parametrize("error", [GqaExportError("refused", "here", "do that"), NotCheckedHere("no GPU"),
                                   RuntimeError("CUDA error"), OSError("no library")])
def test_what_cannot_run_is_neither_a_pass_nor_a_failure_and_says_why(asked, tmp_path, error) -> None:
    def check(*_):
        raise error

    for row in run(tmp_path, check=check):
        assert row["passed"] is None
        assert str(error).split("\n")[0] in row["note"]
        assert row["step_ms"] is None


def test_nothing_installed_is_nothing_tried(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(gpu_benchmark, "is_there", lambda flavor: False)
    assert run(tmp_path) == []


def test_without_a_gpu_the_real_steps_refuse_rather_than_pass(asked, tmp_path) -> None:
    for row in try_engines("CK", tmp_path, 200.0, say=lambda text: None):
        assert row["passed"] is None
        assert row["note"]
