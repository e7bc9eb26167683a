"""The state ops: everything that spells them out agrees with `gqa_export.state_ops`, and the reference is right."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path

import pytest
import torch
from refusal import refused

import gqa_export
from gqa_export import state_ops
from gqa_export.errors import GqaExportError, UnsupportedModel
from gqa_export.state_ops import ACTIVATIONS, CAUSAL_CONV, LINEAR_ATTENTION, RULES, STATE_OPS, StateOp, StatePort
from gqa_export.trace.states import ops, reference

ROOT = Path(gqa_export.__file__).parent.parent
SIZES = {"B": 3, "S": 5, "Hq": 2, "Hk": 3, "Hv": 6, "Dk": 8, "Dv": 4, "Dg": 8, "C": 7, "K": 4, "K-1": 3}
TORCH_TYPES = {"T": torch.float32, "F": torch.float32, "int64": torch.int64}
ATTRIBUTES = {"rule": RULES.index("gated_delta"), "scale": 0.5, "activation": ACTIVATIONS.index("silu")}
EXACT = {"rtol": 1e-12, "atol": 1e-12}
"""for fp64 on both sides: 2**-52 times the hundreds of products that a value of order 1 is made of"""


def shape_of(port: StatePort) -> tuple[int, ...]:
    return tuple(SIZES[letter] for letter in port.shape)


def example_inputs(op: StateOp, device: str = "cpu") -> list[torch.Tensor]:
    """Every input of an op, optional ones too, shaped as the contract says."""
    return [torch.full(shape_of(port), 2, dtype=torch.int64, device=device) if port.type == "int64"
            else torch.randn(shape_of(port), dtype=TORCH_TYPES[port.type], device=device) for port in op.inputs]


def attributes(op: StateOp) -> list[float]:
    return [ATTRIBUTES[name] for name in op.attribute_names]


@pytest.mark.parametrize("op", STATE_OPS, ids=lambda op: op.name)
def test_torch_op_has_the_inputs_and_attributes_in_order_without_defaults(op: StateOp) -> None:
    schema = getattr(torch.ops.gqa, op.torch_name).default._schema
    assert tuple(argument.name for argument in schema.arguments) == (*op.input_names, *op.attribute_names)
    assert len(schema.returns) == len(op.outputs)
    assert not schema.is_mutable
    for argument in schema.arguments:
        assert not argument.has_default_value(), f"{argument.name}: torch.export would drop it"
    for port, argument in zip(op.inputs, schema.arguments, strict=False):
        assert str(argument.type) == ("Optional[Tensor]" if port.optional else "Tensor"), port.name
    for attribute, argument in zip(op.attributes, schema.arguments[len(op.inputs):], strict=True):
        assert str(argument.type) == attribute.type


@pytest.mark.parametrize("op", STATE_OPS, ids=lambda op: op.name)
def test_reference_has_the_inputs_and_attributes_in_order(op: StateOp) -> None:
    parameters = inspect.signature(getattr(reference, op.torch_name)).parameters
    assert tuple(parameters) == (*op.input_names, *op.attribute_names)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("op", STATE_OPS, ids=lambda op: op.name)
def test_reference_and_fake_give_the_shapes_of_the_contract(op: StateOp, device: str) -> None:
    outputs = getattr(torch.ops.gqa, op.torch_name)(*example_inputs(op, device), *attributes(op))
    assert [tuple(output.shape) for output in outputs] == [shape_of(port) for port in op.outputs]


@pytest.mark.parametrize("op", STATE_OPS, ids=lambda op: op.name)
def test_fake_and_eager_agree_as_pytorch_itself_checks_it(op: StateOp) -> None:
    torch.library.opcheck(getattr(torch.ops.gqa, op.torch_name).default,
                          (*example_inputs(op), *attributes(op)), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op", STATE_OPS, ids=lambda op: op.name)
def test_onnx_schema_of_the_trace_is_the_contract(op: StateOp) -> None:
    schema = ops.onnx_schema(op)
    assert (schema.domain, schema.name, schema.since_version) == (state_ops.DOMAIN, op.name, state_ops.VERSION)
    assert tuple(port.name for port in schema.inputs) == op.input_names
    assert tuple(port.name for port in schema.outputs) == op.output_names
    assert set(schema.attributes) == set(op.attribute_names)
    assert all(attribute.required for attribute in schema.attributes.values())


def test_documentation_of_the_ops_holds_the_tables_of_the_contract() -> None:
    spec = importlib.util.spec_from_file_location("op_tables", ROOT / "scripts" / "op_tables.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.PAGE.read_text(encoding="utf-8")
    assert page == script.rewritten(page), "run scripts/op_tables.py"
    for op in STATE_OPS:
        assert script.state(op) in page
    assert all(f"{number} {rule.replace('_', ' ')}" in LINEAR_ATTENTION.attributes[0].meaning
               for number, rule in enumerate(RULES))


def linear_inputs(seed: int, steps: int, lengths: list[int], *, per_key: bool = False, heads: tuple[int, int, int] =
                  (2, 3, 6), sizes: tuple[int, int] = (8, 4)) -> dict[str, torch.Tensor]:
    """fp64 inputs of linear attention: keys of unit length, as the delta rules need them to be stable."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    batch, (hq, hk, hv), (dk, dv) = len(lengths), heads, sizes
    key = draw(batch, steps, hk, dk)
    return {"query": draw(batch, steps, hq, dk), "key": key / key.norm(dim=-1, keepdim=True),
            "value": draw(batch, steps, hv, dv),
            "decay": -torch.nn.functional.softplus(draw(batch, steps, hv, *([dk] if per_key else []))),
            "beta": torch.sigmoid(draw(batch, steps, hv)), "state": draw(batch, hv, dk, dv),
            "new_lengths": torch.tensor(lengths)}


def of_rule(inputs: dict[str, torch.Tensor], rule: str) -> dict[str, torch.Tensor | None]:
    """The inputs with None for what a rule does not take."""
    return {**inputs, "decay": inputs["decay"] if state_ops.is_gated(rule) else None,
            "beta": inputs["beta"] if state_ops.is_delta(rule) else None}


@pytest.mark.parametrize("rule", ["linear", "gated"])
def test_without_the_delta_rule_a_state_is_a_weighted_sum_of_outer_products(rule: str) -> None:
    inputs = linear_inputs(1, 9, [9, 9])
    output, state = ops.linear_attention(**of_rule(inputs, rule), rule=rule, scale=0.3)
    logs = (inputs["decay"] if rule == "gated" else torch.zeros_like(inputs["decay"])).cumsum(1)
    key, query = (inputs[name].repeat_interleave(6 // inputs[name].shape[2], 2) for name in ("key", "query"))
    products = torch.einsum("bshd,bshe->bshde", key, inputs["value"])
    for step in range(9):
        factors = torch.exp(logs[:, step, None] - logs[:, : step + 1])
        wanted = torch.einsum("bsh,bshde->bhde", factors, products[:, : step + 1])
        wanted = wanted + torch.exp(logs[:, step])[..., None, None] * inputs["state"]
        row = 0.3 * torch.einsum("bhd,bhde->bhe", query[:, step], wanted)
        torch.testing.assert_close(output[:, step], row, **EXACT)
    torch.testing.assert_close(state, wanted, **EXACT)


@pytest.mark.parametrize("name", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"])
def test_gated_delta_rule_is_that_of_transformers(name: str) -> None:
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    inputs = {name: value.float() for name, value in linear_inputs(2, 70, [70, 70]).items() if name != "new_lengths"}
    key, query = (inputs[each].repeat_interleave(6 // inputs[each].shape[2], 2) for each in ("key", "query"))
    wanted, wanted_state = getattr(module, name)(
        query, key, inputs["value"], g=inputs["decay"], beta=inputs["beta"], initial_state=inputs["state"].clone(),
        output_final_state=True)
    output, state = ops.linear_attention(**inputs, new_lengths=torch.tensor([70, 70]), rule="gated_delta",
                                         scale=8 ** -0.5)
    # both sides are fp32; chunks sum in another order, 70 steps of values of order 1: some tens of 2**-24
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, wanted_state, rtol=1e-5, atol=1e-5)


def test_one_decay_for_each_key_dimension_equals_one_for_the_head_where_they_are_alike() -> None:
    inputs = linear_inputs(3, 6, [6, 4])
    wide = {**inputs, "decay": inputs["decay"][..., None].expand(-1, -1, -1, 8)}
    for one, other in zip(ops.linear_attention(**inputs, rule="gated_delta", scale=1.0),
                          ops.linear_attention(**wide, rule="gated_delta", scale=1.0), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_a_ragged_batch_is_its_rows_alone(rule: str) -> None:
    lengths = [0, 1, 5, 3]
    inputs = linear_inputs(4, 5, lengths, per_key=True)
    output, state = ops.linear_attention(**of_rule(inputs, rule), rule=rule, scale=0.5)
    for row, length in enumerate(lengths):
        alone = {name: value[row: row + 1] if name in ("state", "new_lengths") else value[row: row + 1, :length]
                 for name, value in inputs.items()}
        wanted, wanted_state = ops.linear_attention(**of_rule(alone, rule), rule=rule, scale=0.5)
        torch.testing.assert_close(output[row: row + 1, :length], wanted, **EXACT)
        torch.testing.assert_close(state[row: row + 1], wanted_state, **EXACT)
        assert not output[row, length:].any()


@pytest.mark.parametrize("rule", RULES)
def test_steps_of_any_size_end_in_the_state_of_one_run(rule: str) -> None:
    inputs = linear_inputs(5, 7, [7, 7])
    whole, whole_state = ops.linear_attention(**of_rule(inputs, rule), rule=rule, scale=0.5)
    state, outputs = inputs["state"], []
    for start, end in ((0, 1), (1, 4), (4, 7)):
        part = {name: value[:, start:end] for name, value in inputs.items() if name not in ("state", "new_lengths")}
        part |= {"state": state, "new_lengths": torch.tensor([end - start] * 2)}
        output, state = ops.linear_attention(**of_rule(part, rule), rule=rule, scale=0.5)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, **EXACT)
    torch.testing.assert_close(state, whole_state, **EXACT)


def test_padded_positions_touch_nothing_even_if_they_are_nan() -> None:
    lengths = [0, 2, 5]
    inputs = linear_inputs(6, 5, lengths)
    padded = torch.arange(5)[None] >= torch.tensor(lengths)[:, None]
    for name in ("query", "key", "value", "decay", "beta"):
        inputs[name][padded] = float("nan")
    output, state = ops.linear_attention(**inputs, rule="gated_delta", scale=0.5)
    assert output.isfinite().all()
    assert state.isfinite().all()
    assert torch.equal(state[0], inputs["state"][0]), "a row without a new token keeps its state"


def conv_inputs(seed: int, steps: int, lengths: list[int], kernel: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    return {"x": draw(len(lengths), 7, steps), "weight": draw(7, kernel), "bias": draw(7),
            "state": draw(len(lengths), 7, kernel - 1), "new_lengths": torch.tensor(lengths)}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kernel", [2, 3, 4, 9])
def test_convolution_is_conv1d_over_state_and_inputs(kernel: int, activation: str) -> None:
    inputs = conv_inputs(7, 6, [6, 6], kernel)
    y, state = ops.causal_conv(**inputs, activation=activation)
    whole = torch.cat([inputs["state"], inputs["x"]], -1)
    wanted = torch.nn.functional.conv1d(whole, inputs["weight"][:, None], inputs["bias"], groups=7)
    torch.testing.assert_close(y, torch.nn.functional.silu(wanted) if activation else wanted, **EXACT)
    assert torch.equal(state, whole[..., 1 - kernel:])


def test_convolution_of_a_ragged_batch_is_its_rows_alone_whatever_the_padding_holds() -> None:
    lengths = [0, 1, 2, 6]
    inputs = conv_inputs(8, 6, lengths)
    inputs["x"][(torch.arange(6)[None] >= torch.tensor(lengths)[:, None])[:, None].expand(-1, 7, -1)] = float("nan")
    y, state = ops.causal_conv(**inputs, activation="silu")
    for row, length in enumerate(lengths):
        alone = {**inputs, "x": inputs["x"][row: row + 1, :, :length], "state": inputs["state"][row: row + 1],
                 "new_lengths": torch.tensor([length])}
        if length:
            wanted, wanted_state = ops.causal_conv(**alone, activation="silu")
            torch.testing.assert_close(y[row: row + 1, :, :length], wanted, **EXACT)
            assert torch.equal(state[row: row + 1], wanted_state)
        else:
            assert torch.equal(state[row], inputs["state"][row])
        assert not y[row, :, length:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_are_fp32_and_outputs_of_the_type_of_the_activations(dtype: torch.dtype) -> None:
    linear = {name: value.to(dtype) if name in ("query", "key", "value") else value if name == "new_lengths" else
              value.float() for name, value in linear_inputs(9, 4, [4, 3]).items()}
    conv = {name: value.to(dtype) if name in ("x", "weight", "bias") else value if name == "new_lengths" else
            value.float() for name, value in conv_inputs(9, 4, [4, 3]).items()}
    output, state = ops.linear_attention(**linear, rule="gated_delta", scale=1.0)
    y, kept = ops.causal_conv(**conv, activation="silu")
    assert (output.dtype, state.dtype, y.dtype, kept.dtype) == (dtype, torch.float32, dtype, torch.float32)
    wide, wide_state = ops.linear_attention(**{name: value.double() if value.is_floating_point() else value
                                               for name, value in linear.items()}, rule="gated_delta", scale=1.0)
    # the state never passes through the narrow type: it is off by fp32 roundings only, of order 1e-7 at values of 1
    torch.testing.assert_close(state.double(), wide_state, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.double(), wide, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(("change", "code"), [
    ({"rule": "decayed"}, "E-MODEL-STATE-RULE"), ({"rule": "linear"}, "E-MODEL-STATE-RULE"),
    ({"decay": None}, "E-MODEL-STATE-RULE"), ({"beta": None}, "E-MODEL-STATE-RULE"),
    ({"query": torch.zeros(2, 4, 4, 8)}, "E-MODEL-STATE-SHAPE"),
    ({"key": torch.zeros(2, 4, 3, 9)}, "E-MODEL-STATE-SHAPE"),
    ({"state": torch.zeros(2, 6, 4, 8)}, "E-MODEL-STATE-SHAPE"),
    ({"state": torch.zeros(2, 6, 8, 4, dtype=torch.bfloat16)}, "E-MODEL-STATE-SHAPE"),
    ({"decay": torch.zeros(2, 4, 6, 4)}, "E-MODEL-STATE-SHAPE"),
    ({"beta": torch.zeros(2, 4, 3)}, "E-MODEL-STATE-SHAPE")])
def test_arguments_that_contradict_one_another_are_refused(change: dict, code: str) -> None:
    arguments = {**linear_inputs(10, 4, [4, 3]), "rule": "gated_delta", "scale": 1.0}
    with refused(code, UnsupportedModel):
        ops.linear_attention(**{**arguments, **change})


@pytest.mark.parametrize(("change", "code"), [
    ({"activation": "gelu"}, "E-MODEL-STATE-ACTIVATION"), ({"weight": torch.zeros(7, 1, 4)}, "E-MODEL-STATE-SHAPE"),
    ({"weight": torch.zeros(7, 1)}, "E-MODEL-STATE-SHAPE"), ({"bias": torch.zeros(4)}, "E-MODEL-STATE-SHAPE"),
    ({"state": torch.zeros(2, 7, 4)}, "E-MODEL-STATE-SHAPE"),
    ({"state": torch.zeros(2, 7, 3, dtype=torch.float16)}, "E-MODEL-STATE-SHAPE")])
def test_arguments_of_a_convolution_that_contradict_one_another_are_refused(change: dict, code: str) -> None:
    with refused(code, UnsupportedModel):
        ops.causal_conv(**{**conv_inputs(11, 4, [4, 3]), "activation": "silu", **change})


@pytest.mark.parametrize("length", [-1, 5])
def test_lengths_outside_the_new_tokens_are_refused(length: int) -> None:
    with refused("E-RUN-STATE-LENGTHS", GqaExportError):
        ops.linear_attention(**linear_inputs(12, 4, [4, length]), rule="gated_delta", scale=1.0)
    with refused("E-RUN-STATE-LENGTHS", GqaExportError):
        ops.causal_conv(**conv_inputs(12, 4, [4, length]), activation="")


def captured(module: torch.nn.Module, inputs: dict[str, torch.Tensor], dims: dict[str, dict[int, str]],
             outputs: list[str]):
    """The ModelProto of a module by the capture and translation of the trace."""
    import onnx_ir as ir

    from gqa_export.trace.capture import capture, export, translate

    given = [capture.Input(name, value, dims.get(name, {})) for name, value in inputs.items()]
    with export.quiet(), torch.no_grad():
        _, table, kept = translate.library(export.OPSET)
        graph, names = capture.capture(module, given, table, kept, [{"batch": 1, "new": 1}, {"batch": 5, "new": 130}])
        return ir.to_proto(translate.translate(graph, names, list(inputs), outputs, {}, export.OPSET))


@pytest.mark.parametrize("rule", RULES)
def test_a_trace_writes_each_op_as_one_node_with_every_input(rule: str) -> None:
    class Layer(torch.nn.Module):
        def forward(self, query, key, value, decay, beta, state, new_lengths, x, weight, kept):
            given = of_rule({"decay": decay, "beta": beta}, rule)
            both = ops.linear_attention(query, key, value, given["decay"], given["beta"], state, new_lengths,
                                        rule=rule, scale=0.25)
            return (*both, *ops.causal_conv(x, weight, None, kept, new_lengths, activation="silu"))

    conv = conv_inputs(13, 3, [3, 2])
    inputs = {**linear_inputs(13, 3, [3, 2]), "x": conv["x"], "weight": conv["weight"], "kept": conv["state"]}
    inputs = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    row, step = {0: "batch"}, {0: "batch", 1: "new"}
    dims = {**dict.fromkeys(("query", "key", "value", "decay", "beta"), step), "state": row, "new_lengths": row,
            "x": {0: "batch", 2: "new"}, "kept": row}
    model = captured(Layer(), inputs, dims, ["output", "new_state", "y", "new_kept"])
    calls = {node.op_type: node for node in model.graph.node if node.domain == state_ops.DOMAIN}
    assert set(calls) == {op.name for op in STATE_OPS}
    for op in STATE_OPS:
        assert len(calls[op.name].input) == len(op.inputs)
        assert all(calls[op.name].input)
    written = {attribute.name: attribute for attribute in calls[LINEAR_ATTENTION.name].attribute}
    assert (written["rule"].i, written["scale"].f) == (RULES.index(rule), 0.25)
    assert calls[CAUSAL_CONV.name].attribute[0].i == ACTIVATIONS.index("silu")
