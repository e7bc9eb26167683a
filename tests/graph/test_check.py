"""The check after lowering: it passes a sound model and names each fault of an unsound one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx
import pytest
from onnx import helper

from gqa_export.errors import GqaExportError
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


@pytest.mark.parametrize(("spoil", "message"), [
    (unnamed_axis, "input is TensorFact"), (lost_output, "1 outputs, expected 2"),
    (unsorted, "reads 'Wt', which is not made before it"), (same_name, "two nodes are called"),
    (made_twice, "'Wt' is made twice"), (same_initializer, "share a name"), (real_file, "has no recipe but"),
    (half_recipe, "has no recipe but"), (unread, "'left_over' is read by no node"),
    (unknown_op, "onnx's checker refuses"), (too_new, "IR version 14")])
def test_each_fault_is_named(spoil: Callable[[onnx.ModelProto], None], message: str):
    model = small.model()
    spoil(model)
    with pytest.raises(GqaExportError, match=message):
        check(model, small.INPUTS, small.OUTPUTS)


def test_an_output_that_no_node_makes_is_named():
    model = small.model()
    model.graph.output[1].name = "w"
    with pytest.raises(GqaExportError, match="output 'w' is never made"):
        check(model, small.INPUTS, (small.OUTPUTS[0], replace(small.OUTPUTS[1], name="w")))
