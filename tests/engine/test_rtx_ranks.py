"""Engines of every rank of a model that is cut: TensorRT lists the collectives of the graph, in its order."""

from __future__ import annotations

import onnx
import pytest
from gqa_models import write_tiny
from onnx import helper
from refusal import refused

from gqa_export.bundle.manifest import read_manifest
from gqa_export.engine.build_log import Layer, Log
from gqa_export.engine.inspect_build import check_collectives
from gqa_export.errors import GqaExportError
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.sharding.collectives import collective, finish_collectives

from .built import build

pytestmark = pytest.mark.whole_model


def test_every_rank_becomes_an_engine_that_meets_the_others_in_one_order(rtx, tmp_path) -> None:
    checkpoint = write_tiny("llama", tmp_path / "ck", num_hidden_layers=1)
    export_onnx(checkpoint, tmp_path / "b", ExportOptions(target="trt-native", dtype="fp16", capacity=64,
                                                          tensor_parallel=2))
    built = build(tmp_path / "b", tmp_path / "e")
    manifest = read_manifest(built.folder)
    assert manifest.engine == built.facts
    assert built.facts.build["collectives"] == ["all_reduce", "all_reduce", "all_gather"]
    for kinds in built.facts.build["layers"].values():
        assert {kind: count for kind, count in kinds.items() if kind.startswith("comm_")} == {
            "comm_allreduce": 2, "comm_allgather": 1}
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
