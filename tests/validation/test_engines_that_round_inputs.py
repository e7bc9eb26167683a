"""Engines whose products round their inputs, which cannot be left out: what they are judged by, and what excuses
nothing. No engine runs here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from refusal import refused

from gqa_export.bundle.engine_facts import ENGINE, EngineFacts
from gqa_export.bundle.manifest import MANIFEST, FileFact, Manifest, read_manifest
from gqa_export.engine.inspect_build import expected_aliases
from gqa_export.engine.profiles import make_profiles
from gqa_export.errors import NotCheckedHere
from gqa_export.files.sha256 import file_sha256
from gqa_export.validation.loss import LossRequest
from gqa_export.validation.reference import open_reference, runnable
from gqa_export.validation.sessions import bundle_session
from gqa_export.validation.validate import validate

from .rounded_bundles import changed, exported, stated

pytestmark = pytest.mark.whole_model


@contextmanager
def engine(bundle: Path, folder: Path, monkeypatch, state: Callable[[Manifest], Manifest] = lambda manifest: manifest,
           graph: Callable[[onnx.ModelProto], None] = lambda model: None) -> Iterator[Path]:
    """No engine runs here: inside, the graph of a bundle stands in for one, whose rounding cannot be left out. state:
    changes what its manifest says. graph: changes what is run."""
    stands_in = changed(bundle, folder.with_name(f"{folder.name}_graph"), graph)
    changed(bundle, folder, lambda model: None)
    manifest = read_manifest(folder)
    facts = EngineFacts("rtx", "1.7", (), "native", make_profiles(manifest, 4, 32), expected_aliases(manifest))
    (folder / ENGINE).write_bytes(b"opened by nobody")
    files = {**manifest.files, ENGINE: FileFact((folder / ENGINE).stat().st_size, file_sha256(folder / ENGINE))}
    (folder / MANIFEST).write_text(replace(state(manifest), engine=facts, files=files).to_json())
    with ExitStack() as stack:
        def load(*_):
            ran, where, target = runnable(stack, stands_in, manifest, "float32", [], lambda *_: None)
            return stack.enter_context(bundle_session(where, ran, "cpu", [], target))

        monkeypatch.setattr("gqa_export.validation.validate.load_engine", load)
        yield folder


def test_an_engine_is_judged_as_shipped_alone(fp8, tmp_path: Path, monkeypatch) -> None:
    with engine(fp8[1], tmp_path / "engine", monkeypatch) as folder:
        verdict = validate(folder, fp8[0], steps=2)
    assert verdict.passed, verdict.failure
    assert (verdict.export_exact, verdict.as_shipped, verdict.activations) == (None, True, "same")


def test_an_engine_that_rounds_more_than_it_says_is_wrong(fp8, tmp_path: Path, monkeypatch) -> None:
    """Exported with the option, and no weight has a scale for its inputs: nothing is to be rounded, and nothing is
    excused."""
    # this checkpoint has scales, and the manifest is refused for it; the numbers alone must tell here
    monkeypatch.setattr("gqa_export.validation.reference.check_exact_inputs", lambda *_: None)
    with engine(fp8[1], tmp_path / "engine", monkeypatch, stated(0)) as folder:
        verdict = validate(folder, fp8[0], steps=2)
    assert not verdict.passed
    assert (verdict.as_shipped, verdict.activations) == (None, "exact")
    assert {case.part for case in verdict.cases} == {""}


def test_an_engine_that_nothing_can_be_held_against_does_not_pass(fp8, tmp_path: Path, monkeypatch) -> None:
    """There is no room for the baseline, which alone rounds as the engine does."""
    with engine(fp8[1], tmp_path / "engine", monkeypatch) as folder:
        known = replace(open_reference(fp8[0], read_manifest(folder), "float32", []), eager=None)
        with refused("E-VALIDATE-MEMORY", NotCheckedHere) as refusal:
            validate(folder, fp8[0], steps=2, reference=known)
    assert "an engine cannot leave the rounding of inputs out" in refusal.error.what


def test_an_engines_cache_codes_are_counted_where_it_rounds_inputs_too(plain, tmp_path: Path, monkeypatch) -> None:
    """Rounding inputs moves 62 % of them in PyTorch too, so that 81 % may be others: a note says how little that tells.
    Scales that are a quarter off move more. Why outputs overflow is told as of any other engine."""
    bundle = exported(plain[0], tmp_path / "b", "trt-plugin", "fp16", quantize="fp8", calibrate=plain[1],
                      kv_cache="int8").folder

    def off(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name in ("key_scale", "value_scale"):
                    attribute.f *= 1.25

    monkeypatch.setattr("gqa_export.validation.parts.overflow_words", lambda *_: "layer 0 overflows")
    for name, graph in (("right", lambda model: None), ("wrong", off)):
        with engine(bundle, tmp_path / name, monkeypatch, graph=graph) as folder:
            verdict = validate(folder, plain[0], steps=2, loss=LossRequest(calibrate=plain[1]))
        codes = [kind for case in verdict.cases for kind in case.kinds if kind.kind == "codes"]
        assert len(codes) == len([case for case in verdict.cases if case.rows])
        assert verdict.passed is (name == "right"), verdict.failure
        assert all(kind.passed for kind in codes) is (name == "right")
        assert verdict.overflow == "layer 0 overflows"
        assert any("rounded inputs move many codes of the cache" in note for note in verdict.notes)
