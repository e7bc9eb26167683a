"""The check after lowering: it passes a sound model and names each fault of an unsound one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx
import pytest
from onnx import helper
from refusal import refused

from gqa_export.errors import UnsupportedModel
from gqa_export.graph.check import check

from . import small


def test_a_sound_model_passes_and_is_not_changed():
    model, before = small.model(), small.model()
    check(model, small.INPUTS, small.OUTPUTS)
    assert model == before


def test_norms_that_onnx_runtime_keeps_in_the_standard_domain_pass():
    model = small.model()
    model.graph.node[3].CopyFrom(helper.make_node("SimplifiedLayerNormalization", ["c", "b"], ["y"], name="n"))
    check(model, small.INPUTS, small.OUTPUTS)


def unnamed_axis(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "rows"


def lost_output(model: onnx.ModelProto) -> None:
    del model.graph.output[1]


def unsorted(model: onnx.ModelProto) -> None:
    first = onnx.NodeProto()
    first.CopyFrom(model.graph.node[0])
    del model.graph.node[0]
    model.graph.node.append(first)


def same_name(model: onnx.ModelProto) -> None:
    model.graph.node[1].name = model.graph.node[0].name


def made_twice(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = "Wt"


def same_initializer(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def real_file(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].external_data[0].value = "model.safetensors"


def half_recipe(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].external_data[0].value = "weights:a+"


def unread(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(small.weight("left_over", [3], "weights:c"))


def unknown_op(model: onnx.ModelProto) -> None:
    model.graph.node[3].op_type = "Relux"


def too_new(model: onnx.ModelProto) -> None:
    model.ir_version = 14


@pytest.mark.parametrize(("spoil", "code", "found"), [
    (unnamed_axis, "E-GRAPH-INTERFACE", "rows"), (lost_output, "E-GRAPH-INTERFACE", "'z'"),
    (unsorted, "E-GRAPH-ORDER", "'Wt'"), (same_name, "E-GRAPH-NAME", "'a/Transpose_0'"),
    (made_twice, "E-GRAPH-NAME", "'Wt'"), (same_initializer, "E-GRAPH-NAME", "'W'"),
    (real_file, "E-GRAPH-RECIPE", "'model.safetensors'"), (half_recipe, "E-GRAPH-RECIPE", "'weights:a+'"),
    (unread, "E-GRAPH-UNREAD", "'left_over'"), (unknown_op, "E-GRAPH-CHECKER", "Relux"),
    (too_new, "E-GRAPH-IR-VERSION", "14")])
def test_each_fault_is_named(spoil: Callable[[onnx.ModelProto], None], code: str, found: str):
    model = small.model()
    spoil(model)
    with refused(code, UnsupportedModel) as refusal:
        check(model, small.INPUTS, small.OUTPUTS)
    assert found in refusal.error.what


def test_an_output_that_no_node_makes_is_named():
    model = small.model()
    model.graph.output[1].name = "w"
    with refused("E-GRAPH-OUTPUT") as refusal:
        check(model, small.INPUTS, (small.OUTPUTS[0], replace(small.OUTPUTS[1], name="w")))
    assert "'w'" in refusal.error.what
