"""The state ops in the dialect of each target against the fp64 reference, in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from gqa_export.environment.onnxruntime_ops import SINCE, registered_on_cpu, state_ops_of_runtime
from gqa_export.graph import edit
from gqa_export.lowering.onnx import states as onnx_states
from gqa_export.lowering.ort import states as ort_states
from gqa_export.state_ops import CAUSAL_CONV, LINEAR_ATTENTION, STATE_OPS
from gqa_export.targets import get_target

from .one_state_op import (
    CASES,
    HALVES,
    assert_same,
    fed_in_fp32,
    in_type,
    label,
    lowered,
    op_model,
    run,
    widened,
)

PASSES = {"ort": ort_states.lower_states, "onnx": onnx_states.lower_states}
OPSET = {"ort": 23, "onnx": 27}
FUSED = {(target, op): name for target in PASSES for op, name in get_target(target).state_ops.items()}
RUNTIME = state_ops_of_runtime("cpu")


def dialect(target, case, model=None):
    """A case in the dialect of a target, on the runtime that is installed."""
    op, feeds, attributes = case
    if FUSED.get((target, op.name)) not in RUNTIME:
        pytest.skip(f"the installed onnxruntime has no {op.name} for target {target}")
    model = op_model(op, feeds, attributes, OPSET[target]) if model is None else model
    return lowered(op, model, feeds, target, PASSES[target], RUNTIME)


def fused_ops(model):
    """The operators that are not among those of which the bodies are made."""
    return {f"{node.domain or 'ai.onnx'}::{node.op_type}" for node in model.graph.node
            if node.domain or node.op_type == "LinearAttention"}


@pytest.mark.parametrize(("target", "case"), [(target, case) for target in PASSES for case in CASES
                                              if (target, case[0].name) in FUSED],
                         ids=lambda value: value if isinstance(value, str) else label(value))
def test_fused_operator_equals_the_fp64_reference(target, case):
    op, feeds, attributes = case
    model = dialect(target, case)
    assert fused_ops(model) == {FUSED[target, op.name]}
    assert_same(op, run(model, feeds), feeds, attributes)


def test_the_installed_runtime_registers_what_the_table_of_versions_has():
    """A table of versions would go on saying so if a kernel was dropped; the registry would not."""
    registered = registered_on_cpu()
    assert registered == {name for name in SINCE if name.startswith("com.microsoft::")}
    assert {name for target in PASSES for name in get_target(target).state_ops.values()} == set(SINCE)
    assert set(get_target("ort").state_ops_since_first) == registered


@pytest.mark.parametrize("target", PASSES)
def test_a_target_names_no_operator_that_is_not_one_of_the_contract(target):
    assert set(get_target(target).state_ops) <= {op.name for op in STATE_OPS}


def test_a_convolution_stays_in_standard_operators_on_onnx():
    op, feeds, attributes = CASES[-6]
    model = lowered(op, op_model(op, feeds, attributes, 27), feeds, "onnx", onnx_states.lower_states, RUNTIME)
    assert not fused_ops(model)
    assert_same(op, run(model, feeds), feeds, attributes)


@pytest.mark.parametrize("element", list(HALVES), ids=TensorProto.DataType.Name)
@pytest.mark.parametrize(("target", "case"), [("ort", CASES[3]), ("ort", CASES[-6]), ("onnx", CASES[5])],
                         ids=lambda value: value if isinstance(value, str) else label(value))
def test_states_stay_fp32_where_activations_are_halves(target, case, element):
    op, feeds, attributes = case
    feeds = in_type(feeds, element)
    narrow = fed_in_fp32(op_model(op, feeds, attributes, OPSET[target]), element)
    model = dialect(target, (op, feeds, attributes), narrow)
    assert fused_ops(model) == {FUSED[target, op.name]}
    assert_same(op, run(model, widened(feeds)), widened(feeds), attributes, output_unit=HALVES[element])


@pytest.mark.parametrize("case", [CASES[3], CASES[-6]], ids=label)
@pytest.mark.parametrize("target", PASSES)
def test_a_runtime_without_the_operator_gets_the_body(target, case):
    op, feeds, attributes = case
    model = lowered(op, op_model(op, feeds, attributes), feeds, target, PASSES[target], frozenset())
    assert not fused_ops(model)
    assert_same(op, run(model, feeds), feeds, attributes)


def test_a_stored_kernel_is_used_as_it_lies():
    """Conv1d keeps [C, 1, K]; the op takes [C, K]: the Squeeze between is not turned into an Unsqueeze behind it."""
    op, feeds, attributes = CASES[-6]
    model = op_model(op, feeds, attributes)
    weight = next(value for value in model.graph.input if value.name == "weight")
    weight.CopyFrom(onnx.helper.make_tensor_value_info("weight", TensorProto.FLOAT, [5, 1, 4]))
    model.graph.node[0].input[1] = "flat"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axis"))
    model.graph.node.insert(0, onnx.helper.make_node("Squeeze", ["weight", "axis"], ["flat"], name="squeeze"))
    flat = dialect("ort", CASES[-6], model)
    assert not {"Squeeze", "Unsqueeze"} & {node.op_type for node in flat.graph.node if "weight" in node.name}
    assert_same(op, run(flat, {**feeds, "weight": feeds["weight"][:, None]}), feeds, attributes)


def test_a_dump_of_the_graph_keeps_what_a_branch_reads():
    op, feeds, attributes = CASES[-6]
    graph = edit.load(dialect("ort", CASES[-6]))
    dumped = edit.snapshot(graph)
    assert {node.name for node in dumped.graph.node} == {node.name for node in graph.nodes}
    assert_same(op, run(dumped, feeds), feeds, attributes)


def node_of(model, suffix):
    found = [node for node in model.graph.node if node.name.endswith(suffix)]
    assert len(found) == 1, f"{len(found)} nodes end with {suffix}"
    return found[0]


def unmask(label):
    """Let what is padded through where a Where keeps it out."""
    def change(model):
        node = node_of(model, label)
        node.op_type, kept = "Identity", node.input[1]
        node.input[:] = [kept]
    return change


def decay_of_zero(model):
    """The state is kept as it is."""
    node = node_of(model, "decay/real")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0, np.float32), "nothing"))
    model.graph.node.insert(list(model.graph.node).index(node),
                            onnx.helper.make_node("Mul", [node.input[1], "nothing"], ["kept"], name="no_decay"))
    node_of(model, "decay/real").input[1] = "kept"


def beta_of_another_head(model):
    node = node_of(model, "beta/real")
    heads = onnx.numpy_helper.from_array(np.array([1, 2, 3, 0]), "turned_heads")
    model.graph.initializer.append(heads)
    turned = onnx.helper.make_node("Gather", [node.input[1], heads.name], ["turned_beta"], axis=2, name="turned_beta")
    node.input[1] = "turned_beta"
    model.graph.node.insert(0, turned)


def state_kept(model):
    """What goes out is what came in."""
    state = next(value.name for value in model.graph.input if "past_key_values" in value.name)
    output = model.graph.output[1].name
    for node in model.graph.node:
        node.output[:] = ["lost_state" if name == output else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node("Identity", [state], [output], name="kept"))


def state_transposed(model):
    output = model.graph.output[1].name
    for node in model.graph.node:
        node.output[:] = ["straight" if name == output else name for name in node.output]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 0, 8, 6]), "whole"))
    model.graph.node.extend([
        onnx.helper.make_node("Transpose", ["straight"], ["turned"], perm=[0, 1, 3, 2], name="turn"),
        onnx.helper.make_node("Reshape", ["turned", "whole"], [output], name="whole")])


def conv_state_shifted(model):
    taps = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(".taps"))
    taps.CopyFrom(onnx.numpy_helper.from_array(np.maximum(onnx.numpy_helper.to_array(taps) - 1, 0), taps.name))


def conv_state_of_the_padded_end(model):
    node = node_of(model, "/new_state")
    node.op_type, node.input[:] = "Identity", [node_of(model, "/fused").output[1]]
    del node.attribute[:]


def no_activation(model):
    for attribute in node_of(model, "/fused").attribute:
        if attribute.name == "activation":
            attribute.s = b"none"


MUTATIONS = {
    "keys leak at the padding": unmask("key/real"), "values leak at the padding": unmask("value/real"),
    "decay at the padding": unmask("decay/real"), "beta at the padding": unmask("beta/real"),
    "rows at the padding": unmask("output/real"), "decay dropped": decay_of_zero,
    "beta of the wrong head": beta_of_another_head, "state not written back": state_kept,
    "state transposed": state_transposed}
CONV_MUTATIONS = {
    "output at the padding": unmask("call/output"), "state shifted by one": conv_state_shifted,
    "state of the padded end": conv_state_of_the_padded_end, "state not written back": state_kept,
    "SiLU dropped": no_activation}


ALL_MUTATIONS = [(target, op, name) for target in PASSES
                 for op, names in ((LINEAR_ATTENTION, MUTATIONS), (CAUSAL_CONV, CONV_MUTATIONS)) for name in names
                 if (target, op.name) in FUSED]


@pytest.mark.parametrize(("target", "op", "name"), ALL_MUTATIONS, ids=lambda value: getattr(value, "name", value))
def test_a_mutated_lowering_is_caught(target, op, name):
    case = next(case for case in CASES if case[0] is op and case[2] in ({"rule": 3, "scale": 0.3}, {"activation": 1}))
    _, feeds, attributes = case
    model = dialect(target, case)
    assert_same(op, run(model, feeds), feeds, attributes)
    (MUTATIONS if op is LINEAR_ATTENTION else CONV_MUTATIONS)[name](model)
    with pytest.raises(AssertionError):
        assert_same(op, run(model, feeds), feeds, attributes)
