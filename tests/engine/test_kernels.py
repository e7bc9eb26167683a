"""The plugin's kernels of a graph: which variants, compiled once, kept, and made anew when a kept file is damaged."""

from __future__ import annotations

import dataclasses

import onnx
import pytest
from gqa_plugins.grouped_attention import cubin, fields
from onnx import TensorProto, helper
from refusal import refused

from gqa_export import attention_op
from gqa_export.engine import kernels
from gqa_export.engine.kernels import compile_kernels, wanted_variants
from gqa_export.engine.weight_bytes import weight_bytes_read

FLAGS = {"has_rotary": 1, "has_sinks": 0, "has_new": 1}
LAYER = {"num_heads": 4, "kv_num_heads": 2, "scale": 0.125, "softcap": 0.0, "window": 0, "rotary_interleaved": 0,
         "growing": 0, **FLAGS, "plugin_version": "1", "plugin_namespace": "gqa"}


def graph(*layers: dict, cast: bool = True) -> onnx.ModelProto:
    """Attention nodes alone, rotary tables through a Cast as the target writes them."""
    nodes, inputs, tables = [], [], []
    for table in ("cos", "sin"):
        tables.append(helper.make_tensor(f"{table}_fp32", TensorProto.FLOAT, [64, 16], [0.0] * 1024))
        nodes.append(helper.make_node("Cast" if cast else "Neg", [f"{table}_fp32"], [table], to=TensorProto.FLOAT16))
    for number, layer in enumerate(layers):
        values = {**LAYER, **layer}
        past = [f"past_{kind}_{number}" for kind in ("key", "value")]
        inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", 2, 64, 32]) for name in past]
        names = {name: f"{name}_{number}" if name.startswith("past_k") or name.startswith("past_v") else name
                 for name in attention_op.INPUT_NAMES}
        nodes.append(helper.make_node(attention_op.OP, [names[name] for name in fields.node_inputs(values)], ["o"],
                                      f"layer{number}", domain="gqa", **values))
    return helper.make_model(helper.make_graph(nodes, "g", inputs, [], tables))


def test_layers_alike_share_their_variants_and_others_add_theirs() -> None:
    same = wanted_variants(graph({}, {"scale": 0.5}), 64, "float16")
    assert [variant.name for variant in same] == [
        "prefill-fp16-g2-d32-e32-r128", "decode-fp16-g2-d32-e32-r2", "combine-fp16-g2-d32-e32",
        "append-fp16-g2-d32-e32-rotary32"]
    more = wanted_variants(graph({}, {"window": 16}), 64, "bfloat16")
    assert len(more) == 6
    assert {variant.dtype for variant in more} == {"bf16"}
    assert wanted_variants(helper.make_model(helper.make_graph([], "g", [], [])), 64, "float16") == ()


def test_a_rotary_table_that_is_no_constant_is_refused() -> None:
    with refused("E-ENGINE-ROTARY"):
        wanted_variants(graph({}, cast=False), 64, "float16")


def test_a_node_of_another_contract_is_refused() -> None:
    with refused("E-ENGINE-LAYER-FIELDS"):
        wanted_variants(graph({"page_size": 16}), 64, "float16")


def test_a_plugin_of_another_version_is_refused_by_its_number() -> None:
    with refused("E-ENGINE-PLUGIN-VERSION") as refusal:
        wanted_variants(graph({"plugin_version": "4"}), 64, "float16")
    assert "--target trt-plugin" in refusal.error.fix


def test_a_step_reads_every_weight_but_the_tables_it_gathers_a_row_of() -> None:
    table, weight = helper.make_tensor("table", TensorProto.FLOAT, [50, 8], [0.0] * 400), helper.make_tensor(
        "weight", TensorProto.BFLOAT16, [8, 4], [0.0] * 32)
    nodes = [helper.make_node("Gather", ["table", "ids"], ["x"]), helper.make_node("MatMul", ["x", "weight"], ["y"])]
    made = helper.make_model(helper.make_graph(nodes, "g", [], [], [table, weight]))
    assert weight_bytes_read(made) == 8 * 4 * 2
    tied = helper.make_model(helper.make_graph(
        [*nodes, helper.make_node("Gemm", ["x", "table"], ["z"], transB=1)], "g", [], [], [table, weight]))
    assert weight_bytes_read(tied) == 8 * 4 * 2 + 50 * 8 * 4


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A compiler that notes what it is asked for; the cache is a folder of this test."""
    monkeypatch.setenv(kernels.CACHE, str(tmp_path / "kept"))
    asked: list[tuple[str, int]] = []

    def compile_variant(variant, capability):
        asked.append((variant.kernel, capability))
        return cubin.Cubin(variant.kernel, "name", capability, 0, 128, 16, (), {}, f"{variant.name}".encode())

    monkeypatch.setattr(cubin, "compile_variant", compile_variant)
    return asked


def quiet(*_: object) -> None:
    """No progress."""


def test_every_variant_is_compiled_for_every_capability_once(compiler, tmp_path) -> None:
    variants = wanted_variants(graph({}, {}), 64, "float16")
    seen: list[tuple] = []
    first = compile_kernels(variants, (80, 89), lambda *what: seen.append(what))
    assert len(compiler) == 8
    assert seen[0] == ("compiling kernels for 8.0", 0, 8)
    assert set(first.keys) == {variant.name for variant in variants}
    assert set(fields.unpack(first.container)) == {sha for by in first.keys.values() for sha in by.values()}
    again = compile_kernels(variants, (80, 89), quiet)
    assert len(compiler) == 8, "the second engine of a model compiles nothing"
    assert again == first
    compile_kernels(variants, (120,), quiet)
    assert len(compiler) == 12
    assert not [path for path in (tmp_path / "kept").iterdir() if path.name.startswith("tmp")]


def test_a_kept_file_that_is_damaged_is_made_anew(compiler, tmp_path) -> None:
    variants = wanted_variants(graph({}), 64, "float16")
    first = compile_kernels(variants, (80,), quiet)
    victim = next((tmp_path / "kept").iterdir())
    victim.write_bytes(victim.read_bytes()[:-1])
    assert compile_kernels(variants, (80,), quiet) == first
    assert len(compiler) == 5


def test_other_sources_or_another_triton_are_other_files(compiler, monkeypatch) -> None:
    variants = wanted_variants(graph({}), 64, "float16")
    compile_kernels(variants, (80,), quiet)
    monkeypatch.setattr(kernels, "version", lambda name: "99.0")
    compile_kernels(variants, (80,), quiet)
    assert len(compiler) == 8


def test_a_cache_that_cannot_be_written_is_no_error(compiler, monkeypatch, tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(kernels.CACHE, str(tmp_path / "file" / "kept"))
    variants = wanted_variants(graph({}), 64, "float16")
    assert compile_kernels(variants, (80,), quiet) == compile_kernels(variants, (80,), quiet)
    assert len(compiler) == 8


def test_the_cache_is_in_the_user_s_folder(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv(kernels.CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert kernels.kernel_folder() == tmp_path / "gqa-export" / "kernels"


def test_without_triton_the_two_ways_out_are_named(compiler, monkeypatch) -> None:
    def missing(name: str) -> str:
        raise kernels.PackageNotFoundError(name)

    monkeypatch.setattr(kernels, "version", missing)
    with refused("E-ENV-TRITON") as refusal:
        compile_kernels((), (80,), quiet)
    assert "--attention native" in refusal.error.fix
    assert "gqa-export[plugins]" in refusal.error.fix


def test_the_digest_is_that_of_the_container(compiler) -> None:
    one = compile_kernels(wanted_variants(graph({}), 64, "float16"), (80,), quiet)
    assert one.sha256 != dataclasses.replace(one, container=fields.pack(())).sha256
