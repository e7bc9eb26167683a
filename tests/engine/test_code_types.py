"""What does not build for a GPU is refused before the build, with its capability and what to do; the page's table is
the module's."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from refusal import refused

from gqa_export.engine.choose_library import RTX_CAPABILITIES, RTX_DEFAULT, Choice, dotted
from gqa_export.engine.code_types import CODE_TYPES, cache_types_of, code_types_of, code_types_of_kinds, for_code_types
from gqa_export.environment.tensorrt_libraries import Library

INT8, INT4, FP8, FP4 = CODE_TYPES


def choice(*capabilities: int, flavor: str = "rtx") -> Choice:
    return Choice(Library(flavor, "tensorrt_rtx", "1.7", ()), capabilities if flavor == "rtx" else (), capabilities)


def test_the_table_says_what_was_seen() -> None:
    for each in CODE_TYPES:
        assert sorted((*each.built, *each.refused)) == sorted(RTX_CAPABILITIES)
        assert all(number >= each.least for number in each.built)
        assert all(number < each.least for number in each.refused)


@pytest.mark.parametrize(("types", "capability", "fix"), [
    ((INT4,), 75, "8.0"), ((FP8,), 75, "8.9"), ((FP8,), 80, "8.9"), ((FP8,), 86, "8.9"), ((FP4, FP8), 80, "12.0"),
    ((FP4,), 89, "12.0"), ((INT8, FP4), 89, "12.0")])
@pytest.mark.parametrize("flavor", ["rtx", "tensorrt"])
def test_a_capability_that_cannot_hold_the_codes_is_refused(types, capability: int, fix: str, flavor: str) -> None:
    for kept, instead in ((True, "dequantize"), (False, "int4")):
        with refused("E-ENGINE-CODES") as refusal:
            for_code_types(choice(capability, flavor=flavor), types, "b", kept=kept, named=True)
        assert dotted((capability,)) in refusal.error.what
        assert f"--compute-capability {fix}" in refusal.error.fix
        assert f"--quantize {instead}" in refusal.error.fix
        assert refusal.error.exit_code == 2


def test_one_of_several_that_are_named_is_refused_too() -> None:
    with refused("E-ENGINE-CODES"):
        for_code_types(choice(*RTX_DEFAULT), (FP8,), "b", kept=False, named=True)


@pytest.mark.parametrize(("types", "left"), [((), RTX_DEFAULT), ((INT8, INT4), RTX_DEFAULT), ((FP8,), (89, 120)),
                                             ((FP8, FP4), (120,))])
def test_the_default_leaves_out_what_cannot_hold_them_and_says_so(types, left: tuple[int, ...]) -> None:
    found = for_code_types(choice(*RTX_DEFAULT), types, "b", kept=False, named=False)
    assert found.capabilities == found.engine_capabilities == left
    assert bool(found.notes) == (left != RTX_DEFAULT)
    assert all("8.0" in note for note in found.notes)


@pytest.mark.parametrize("each", CODE_TYPES)
def test_what_was_built_is_not_refused(each) -> None:
    found = for_code_types(choice(*each.built), (each,), "b", kept=False, named=True)
    assert found.capabilities == each.built


def test_types_are_read_from_the_graph() -> None:
    weights = [TensorProto(name=str(kind), dims=[2], data_type=kind, data_location=TensorProto.EXTERNAL)
               for kind in (TensorProto.FLOAT, TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN)]
    model = helper.make_model(helper.make_graph([], "g", [], [], weights))
    assert isinstance(model, onnx.ModelProto)
    assert code_types_of(model) == (FP8, FP4)


def cached(kind: int) -> onnx.ModelProto:
    """A graph whose cache is of this type."""
    past, present = (helper.make_tensor_value_info(name, kind, [1, 2, "P", 4]) for name in ("past", "present"))
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "S"])
    return helper.make_model(helper.make_graph([], "g", [ids, past], [present], []))


def test_the_types_of_a_cache_are_those_of_inputs_and_outputs() -> None:
    assert [cache_types_of(cached(kind)) for kind in (TensorProto.FLOAT8E4M3FN, TensorProto.INT8,
                                                      TensorProto.FLOAT16)] == [(FP8,), (INT8,), ()]
    assert code_types_of(cached(TensorProto.FLOAT8E4M3FN)) == ()


def test_a_cache_of_fp8_is_not_built_by_default_where_nothing_converts_it() -> None:
    found = for_code_types(choice(*RTX_DEFAULT), (FP8,), "b", kept=True, named=False, cache=True)
    assert found.capabilities == found.engine_capabilities == (89, 120)
    assert found.notes == ("not built for 8.0: the cache is FP8 (e4m3), which needs 8.9",)
    with refused("E-ENGINE-CODES") as refusal:
        for_code_types(choice(80), (FP8,), "b", kept=True, named=True, cache=True)
    assert "the cache is FP8" in refusal.error.what
    assert refusal.error.fix == "use --compute-capability 8.9, or export the checkpoint again with --kv-cache int8"


def test_a_build_leaves_out_what_cannot_hold_the_weights_and_what_cannot_hold_the_cache(tmp_path, monkeypatch) -> None:
    """As `gqa-export trt` on a bundle with a cache of fp8 and default capabilities; the build itself is not run."""
    from types import SimpleNamespace

    from gqa_export.engine import build

    class Stop(Exception):
        """What comes after is not under test."""

    def rank(bundle, manifest, inside, kind, choice, *others):
        raise Stop(*choice.capabilities)

    manifest = SimpleNamespace(long=None, quantization=None)
    monkeypatch.setattr(build, "read_manifest", lambda folder: manifest)
    for name in ("check_files", "check_claims", "make_profiles"):
        monkeypatch.setattr(build, name, lambda *given: None)
    monkeypatch.setattr(build, "check_bundle", lambda *given: "plugin")
    monkeypatch.setattr(build, "check_request", lambda *given: choice(*RTX_DEFAULT))
    monkeypatch.setattr(build, "ranks_of", lambda *given: [("", tmp_path, manifest)])
    monkeypatch.setattr(build, "read_graph", lambda path: cached(TensorProto.FLOAT8E4M3FN))
    monkeypatch.setattr(build, "_rank", rank)
    with pytest.raises(Stop) as built:
        build.build_engine(tmp_path, tmp_path / "engine", build.EngineOptions())
    assert built.value.args == (89, 120)


def test_the_page_has_this_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text(encoding="utf-8")
    for each in CODE_TYPES:
        row = (each.name, dotted((each.least,)), dotted(each.built), dotted(each.refused) or "-")
        assert f"| {' | '.join(row)} |" in page


def test_a_checkpoint_is_refused_before_it_is_exported(tmp_path: Path, monkeypatch) -> None:
    from checkpoint.quantized.test_other_formats import fp8, fp8_blocks
    from quantized_checkpoints import write_quantized

    from gqa_export.engine.build import EngineOptions
    from gqa_export.exporting import to_engine
    from gqa_export.progress import silent

    write_quantized(tmp_path / "checkpoint", fp8(32, 32), fp8_blocks(32, 32))
    monkeypatch.setattr(to_engine, "check_request", lambda *_: choice(80))
    with refused("E-ENGINE-CODES") as refusal:
        to_engine.make_engine(str(tmp_path / "checkpoint"), tmp_path / "engine", EngineOptions(capabilities=("8.0",)),
                              silent)
    assert "FP8" in refusal.error.what
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert code_types_of_kinds({"e4m3", "int"}) == (FP8,)
