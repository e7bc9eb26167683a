"""Engines of every rank of a model that is cut: TensorRT lists the collectives of the graph, in its order."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from onnx import helper
from refusal import refused
from smollm2_engines import CUT

from gqa_export.bundle.manifest import read_manifest
from gqa_export.engine import inspect_build
from gqa_export.engine.build_log import Layer, Log
from gqa_export.engine.inspect_build import check_collectives
from gqa_export.errors import GqaExportError
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.sharding.collectives import collective, finish_collectives

from .built import build

pytestmark = pytest.mark.whole_model


LAYERS, RANKS = CUT, 3
COMMITTED = Path(__file__).parents[2] / "docs" / "benchmarks" / "tensor-parallel.json"


def test_every_rank_becomes_an_engine_with_the_collectives_in_one_order(rtx, smollm2_cut, tmp_path,
                                                                        monkeypatch) -> None:
    """The first two layers of SmolLM2-135M, 9 query and 3 key/value heads. TensorRT's own log lists an all_reduce after
    every o_proj and down_proj, the gather of the head, and no other. All thirty: scripts/benchmark_ranks.py, whose
    committed result has the same collectives."""
    listed_by_tensorrt = []

    def check(model, log, profiles):
        listed_by_tensorrt.append([log.collectives(number) for number in range(profiles)])
        return check_collectives(model, log, profiles)

    monkeypatch.setattr(inspect_build, "check_collectives", check)
    export_onnx(smollm2_cut, tmp_path / "b", ExportOptions(target="trt-native", dtype="fp16", capacity=64,
                                                           quantize="dequantize", tensor_parallel=RANKS))
    built = build(tmp_path / "b", tmp_path / "e", capabilities=(89,))
    manifest = read_manifest(built.folder)
    assert manifest.engine == built.facts
    modules = [("all_reduce", f"model.layers.{layer}.{module}/") for layer in range(LAYERS)
               for module in ("self_attn.o_proj", "mlp.down_proj")] + [("all_gather", "lm_head/")]
    assert len(listed_by_tensorrt) == RANKS
    for profiles in listed_by_tensorrt:
        assert len(profiles) == 2
        for found in profiles:
            stems = [(kind, name[:len(module)]) for (kind, name), (_, module) in zip(found, modules, strict=True)]
            assert stems == modules
    assert built.facts.build["collectives"] == [kind for kind, _ in modules]
    committed = json.loads(COMMITTED.read_text(encoding="utf-8"))["smollm2"]["collectives"]
    assert list(manifest.parallel.collectives) == [*committed[:2 * LAYERS], committed[-1]]
    for rank in manifest.parallel.ranks:
        engine = built.folder / rank.folder / "model.engine"
        assert manifest.files[f"{rank.folder}/model.engine"].size == engine.stat().st_size
    assert not list(built.folder.glob("*.engine"))


def graph_with(*names: str) -> onnx.ModelProto:
    nodes = [collective("all_reduce", name, f"{name}/sum", f"{name}/all_reduce") for name in names]
    model = helper.make_model(helper.make_graph(nodes, "g", [], []))
    finish_collectives(model, 2)
    return model


def listed(*layers: tuple[str, str]) -> Log:
    return Log(tuple(Layer(name, kind, 0, (), ()) for kind, name in layers), {})


GOOD = (("comm_allreduce", "a/all_reduce_myl1_8"), ("gemm", "x"), ("comm_allreduce", "b/all_reduce_myl1_9"))


def test_a_build_log_with_the_collectives_of_the_graph_passes() -> None:
    assert check_collectives(graph_with("a", "b"), listed(*GOOD), 1) == ["all_reduce", "all_reduce"]


@pytest.mark.parametrize("layers", [GOOD[:1], GOOD[::-1], (*GOOD, ("comm_allgather", "c")), (), (
    ("comm_allgather", "a/all_reduce_myl1_8"), GOOD[2])], ids=["lost", "exchanged", "one more", "none", "another kind"])
def test_another_list_of_collectives_is_refused(layers) -> None:
    log = listed(*layers, ("gemm", "y"))
    with refused("E-ENGINE-COLLECTIVES", GqaExportError):
        check_collectives(graph_with("a", "b"), log, 1)
