"""Everything that spells the op out agrees with `gqa_export.attention_op`: reference, torch op, ONNX, kernels, docs."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path

import pytest
import torch
from gqa_plugins.grouped_attention import reference

import gqa_export
from gqa_export import attention_op

ROOT = Path(gqa_export.__file__).parent.parent
ALL = (*attention_op.INPUT_NAMES, *attention_op.ATTRIBUTE_NAMES)
PYTHON_TYPES = {"int": "int", "float": "float"}

B, S, P, C, H, K, D, E, R, M = 2, 3, 5, 11, 6, 2, 8, 4, 4, 64


def sizes(growing: int) -> dict[str, int]:
    """A value for every letter of the contract's dimension key."""
    past = P if growing else C
    return {"B": B, "S": S, "P": past, "H": H, "K": K, "D": D, "E": E, "M": M, "T": P + S if growing else C,
            "H*D": H * D, "K*D": K * D, "K*E": K * E, "H*E": H * E, "R/2": R // 2}


def shape_of(port: attention_op.Port, growing: int) -> tuple[int, ...]:
    return tuple(sizes(growing)[letter] for letter in port.shape)


def example_inputs(growing: int, device: str = "cpu") -> list[torch.Tensor]:
    """Every input of the op, optional ones too, shaped as the contract says."""
    values = []
    for port in attention_op.INPUTS:
        if port.type == "int32":
            values.append(torch.full(shape_of(port, growing), 2, dtype=torch.int32, device=device))
        else:
            values.append(torch.randn(shape_of(port, growing), device=device))
    return values


ATTRIBUTES = {"num_heads": H, "kv_num_heads": K, "scale": 0.5, "softcap": 3.0, "window": 4, "rotary_interleaved": 0}


def test_every_attribute_of_the_contract_is_in_this_test() -> None:
    assert (*ATTRIBUTES, "growing") == attention_op.ATTRIBUTE_NAMES


def test_reference_has_the_inputs_and_attributes_in_order() -> None:
    parameters = inspect.signature(reference.grouped_query_attention).parameters
    both = (*attention_op.ATTRIBUTE_NAMES, *attention_op.CODE_ATTRIBUTE_NAMES)
    assert tuple(parameters) == (*attention_op.INPUT_NAMES, *both)
    assert tuple(p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY) == both
    defaults = {name: parameters[name].default for name in attention_op.CODE_ATTRIBUTE_NAMES}
    assert defaults == {"cache_codes": 0, "key_scale": 1.0, "value_scale": 1.0}, "a call of version 1 has none of them"


def test_torch_op_has_the_inputs_and_attributes_in_order_without_defaults() -> None:
    from gqa_export.trace.capture import custom_op

    schema = torch.ops.gqa.grouped_query_attention.default._schema
    assert custom_op is not None
    assert tuple(argument.name for argument in schema.arguments) == ALL
    assert len(schema.returns) == len(attention_op.OUTPUTS)
    assert not schema.is_mutable
    for argument in schema.arguments:
        assert not argument.has_default_value(), f"{argument.name}: torch.export would drop it"
    for attribute, argument in zip(attention_op.ATTRIBUTES, schema.arguments[len(attention_op.INPUTS):], strict=True):
        assert str(argument.type) == attribute.type
    for port, argument in zip(attention_op.INPUTS, schema.arguments, strict=False):
        optional = port.optional
        assert str(argument.type) == ("Optional[Tensor]" if optional else "Tensor"), port.name


@pytest.mark.parametrize("growing", [0, 1])
def test_reference_gives_the_shapes_of_the_contract(growing: int) -> None:
    outputs = reference.grouped_query_attention(*example_inputs(growing), **ATTRIBUTES, growing=growing)
    assert [tuple(output.shape) for output in outputs] == [shape_of(port, growing) for port in attention_op.OUTPUTS]


@pytest.mark.parametrize("growing", [0, 1])
def test_fake_gives_the_shapes_of_the_contract(growing: int) -> None:
    import gqa_export.trace.capture.custom_op  # noqa: F401 registers the op

    outputs = torch.ops.gqa.grouped_query_attention(*example_inputs(growing, "meta"), *ATTRIBUTES.values(), growing)
    assert [tuple(output.shape) for output in outputs] == [shape_of(port, growing) for port in attention_op.OUTPUTS]


def test_onnx_schema_of_the_trace_is_the_contract() -> None:
    from gqa_export.trace.capture.custom_op import onnx_schema

    schema = onnx_schema()
    assert (schema.domain, schema.name, schema.since_version) == (attention_op.DOMAIN, attention_op.OP,
                                                                   attention_op.VERSION)
    assert tuple(port.name for port in schema.inputs) == attention_op.INPUT_NAMES
    assert tuple(port.name for port in schema.outputs) == attention_op.OUTPUT_NAMES
    assert set(schema.attributes) == set(attention_op.ATTRIBUTE_NAMES)
    assert all(attribute.required for attribute in schema.attributes.values())


def test_function_body_has_the_inputs_outputs_and_attributes_in_order() -> None:
    from gqa_export.lowering import attention_function

    function = attention_function.function_proto(23)
    assert (function.domain, function.name) == (attention_op.DOMAIN, attention_op.OP)
    assert tuple(function.input) == attention_op.INPUT_NAMES
    assert tuple(function.output) == attention_op.OUTPUT_NAMES
    assert tuple(function.attribute) == attention_op.ATTRIBUTE_NAMES
    assert not function.attribute_proto, "an attribute with a default could be left out of a call"


def test_kernels_entry_takes_every_input_and_attribute_by_its_name() -> None:
    pytest.importorskip("triton", reason="the kernels need Triton")
    from gqa_plugins.grouped_attention import grouped_query_attention

    parameters = set(inspect.signature(grouped_query_attention).parameters)
    beside = {"max_length", "backend", "ring"}  # not of the op; the entry is static: of `growing`, whether it is a ring
    # The type of the codes is that of the cache.
    assert parameters - beside == set(ALL) - {"growing"} | {"key_scale", "value_scale"}


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_documentation_of_the_op_holds_the_tables_of_the_contract() -> None:
    script = load_script("op_tables")
    page = script.PAGE.read_text(encoding="utf-8")
    assert page == script.rewritten(page), "run scripts/op_tables.py"
