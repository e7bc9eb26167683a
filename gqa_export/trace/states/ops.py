"""The torch ops `gqa::linear_attention` and `gqa::causal_conv` that a trace records: front doors, fakes, translations.

Callers use the functions `linear_attention` and `causal_conv`, which check their arguments and call the torch op; the
op itself has the signature of `gqa_export.state_ops`, optional inputs None. Its eager implementation is the reference,
so a traced model can be run and compared before any ONNX exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import state_ops
from ...errors import UnsupportedModel
from ...state_ops import ACTIVATIONS, CAUSAL_CONV, LINEAR_ATTENTION, RULES, StateOp, is_delta, is_gated
from . import reference

FIX = "this layer computes something that the state ops do not: please report the model"


def linear_attention(query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, beta: Tensor | None,
                     state: Tensor, new_lengths: Tensor, *, rule: str, scale: float) -> tuple[Tensor, Tensor]:
    """Linear attention over new tokens, from a state and into the next one.

    Args:
        query: [B, S, Hq, Dk]; Hq divides Hv.
        key: [B, S, Hk, Dk]; Hk divides Hv.
        value: [B, S, Hv, Dv].
        decay: logarithm of the factor on the state, [B, S, Hv] or for each key dimension [B, S, Hv, Dk]; None exactly
            with the rules "linear" and "delta".
        beta: [B, S, Hv]; None exactly with the rules "linear" and "gated".
        state: [B, Hv, Dk, Dv], fp32 or fp64; all arithmetic is done in its type.
        new_lengths: [B] int64, valid new tokens per sequence.
        rule: "linear", "gated", "delta" or "gated_delta".
        scale: factor on the output.

    Returns:
        The output [B, S, Hv, Dv] in the widest type of query, key and value, zero at padded positions, and the new
        state.

    Raises:
        UnsupportedModel: the arguments contradict one another or the rule.
    """
    if rule not in RULES:
        raise UnsupportedModel(f"unknown update rule {rule!r}, expected one of {', '.join(RULES)}",
                               "linear_attention", FIX, code="E-MODEL-STATE-RULE")
    for name, given, wanted in (("decay", decay, is_gated(rule)), ("beta", beta, is_delta(rule))):
        if (given is not None) != wanted:
            raise UnsupportedModel(f"rule {rule!r} {'needs' if wanted else 'does not take'} {name}",
                                   "linear_attention", FIX, code="E-MODEL-STATE-RULE")
    heads, size = value.shape[2], query.shape[-1]
    _expect("linear_attention", {
        f"query and key have {query.shape[2]} and {key.shape[2]} heads, which do not divide {heads}":
            heads % query.shape[2] == 0 and heads % key.shape[2] == 0,
        f"keys have size {key.shape[-1]}, queries {size}": key.shape[-1] == size,
        f"the state is {_sizes(state)}, expected [.., {heads}, {size}, {value.shape[-1]}]":
            state.dim() == 4 and tuple(state.shape[1:]) == (heads, size, value.shape[-1]),
        f"decay is {_sizes(decay)}, expected [.., .., {heads}] or [.., .., {heads}, {size}]":
            decay is None or tuple(decay.shape[2:]) in ((heads,), (heads, 1), (heads, size)),
        f"beta is {_sizes(beta)}, expected [.., .., {heads}]":
            beta is None or (beta.dim() == 3 and beta.shape[2] == heads),
        **_state_type(state)})
    wide = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    if decay is not None and decay.dim() == 3:
        decay = decay[..., None]
    output, new_state = torch.ops.gqa.linear_attention(
        query.to(wide), key.to(wide), value.to(wide), None if decay is None else decay.to(state.dtype),
        None if beta is None else beta.to(state.dtype), state, new_lengths.to(torch.int64), RULES.index(rule),
        float(scale))
    return output, new_state


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, new_lengths: Tensor, *,
                activation: str) -> tuple[Tensor, Tensor]:
    """A depthwise causal convolution over new inputs, from a state and into the next one.

    Args:
        x: [B, C, S].
        weight: [C, K], K at least 2; its last column meets the token itself.
        bias: [C] or None.
        state: [B, C, K-1], fp32 or fp64, the inputs before the first new one; all arithmetic is done in its type.
        new_lengths: [B] int64, valid new tokens per sequence.
        activation: "" or "silu".

    Returns:
        y [B, C, S] in the type of `x`, zero at padded positions, and the new state.

    Raises:
        UnsupportedModel: the arguments contradict one another.
    """
    if activation not in ACTIVATIONS:
        raise UnsupportedModel(f"unknown activation {activation!r}, expected one of {ACTIVATIONS}", "causal_conv",
                               FIX, code="E-MODEL-STATE-ACTIVATION")
    channels = x.shape[1]
    _expect("causal_conv", {
        f"the weight is {_sizes(weight)}, expected [{channels}, K] with K at least 2":
            weight.dim() == 2 and weight.shape[0] == channels and weight.shape[1] >= 2,
        f"the bias is {_sizes(bias)}, expected [{channels}]": bias is None or tuple(bias.shape) == (channels,),
        f"the state is {_sizes(state)}, expected [.., {channels}, {weight.shape[-1] - 1}]":
            state.dim() == 3 and tuple(state.shape[1:]) == (channels, weight.shape[-1] - 1),
        **_state_type(state)})
    y, new_state = torch.ops.gqa.causal_conv(
        x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), state, new_lengths.to(torch.int64),
        ACTIVATIONS.index(activation))
    return y, new_state


def _sizes(tensor: Tensor | None) -> str:
    return str(list(tensor.shape)) if tensor is not None else "None"


def _state_type(state: Tensor) -> dict[str, bool]:
    return {f"the state is {state.dtype}, expected float32": state.dtype in (torch.float32, torch.float64)}


def _expect(op: str, conditions: dict[str, bool]) -> None:
    wrong = [message for message, holds in conditions.items() if not holds]
    if wrong:
        raise UnsupportedModel(f"the tensors of a state layer do not fit together: {'; '.join(wrong)}", op, FIX,
                               code="E-MODEL-STATE-SHAPE")


@torch.library.custom_op("gqa::linear_attention", mutates_args=())
def _linear_attention(query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, beta: Tensor | None,
                      state: Tensor, new_lengths: Tensor, rule: int, scale: float) -> tuple[Tensor, Tensor]:
    return reference.linear_attention(query, key, value, decay, beta, state, new_lengths, rule, scale)


@_linear_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, beta: Tensor | None, state: Tensor,
      new_lengths: Tensor, rule: int, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(value, memory_format=torch.contiguous_format), torch.empty_like(state)


@torch.library.custom_op("gqa::causal_conv", mutates_args=())
def _causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, new_lengths: Tensor,
                 activation: int) -> tuple[Tensor, Tensor]:
    return reference.causal_conv(x, weight, bias, state, new_lengths, activation)


@_causal_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, new_lengths: Tensor,
      activation: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(state)


def onnx_schema(op: StateOp) -> Any:
    """The ONNX schema of an op, made from the contract (onnx.defs.OpSchema)."""
    from onnx.defs import OpSchema

    types = {"int": OpSchema.AttrType.INT, "float": OpSchema.AttrType.FLOAT}
    kinds = {"T": "T", "F": "F", "int64": "tensor(int64)"}
    wide = ["tensor(float)", "tensor(double)"]
    return OpSchema(
        op.name, state_ops.DOMAIN, state_ops.VERSION,
        inputs=[OpSchema.FormalParameter(port.name, kinds[port.type], port.meaning) for port in op.inputs],
        outputs=[OpSchema.FormalParameter(port.name, kinds[port.type], port.meaning) for port in op.outputs],
        attributes=[OpSchema.Attribute(a.name, types[a.type], a.meaning, required=True) for a in op.attributes],
        type_constraints=[("T", [*wide, "tensor(float16)", "tensor(bfloat16)"], ""), ("F", wide, "")])


def translation_table() -> dict[Any, Any]:
    """What the capture needs to write the torch ops as `gqa::LinearAttention` and `gqa::CausalConv`."""
    import onnxscript

    domain = onnxscript.values.Opset(state_ops.DOMAIN, state_ops.VERSION)
    linear_op, conv_op = (onnxscript.values.Op(domain, op.name, onnx_schema(op))
                          for op in (LINEAR_ATTENTION, CAUSAL_CONV))

    # no types for the tensors: the exporter tells attributes from inputs by the parameters that have one
    def linear(query, key, value, decay, beta, state, new_lengths, rule: int, scale: float):  # type: ignore[no-untyped-def]
        decay = decay if decay is not None else _neutral(LINEAR_ATTENTION, "decay", state)
        beta = beta if beta is not None else _neutral(LINEAR_ATTENTION, "beta", state)
        return linear_op(query, key, value, decay, beta, state, new_lengths, rule=rule, scale=scale)

    def conv(x, weight, bias, state, new_lengths, activation: int):  # type: ignore[no-untyped-def]
        bias = bias if bias is not None else _neutral(CAUSAL_CONV, "bias", weight)
        return conv_op(x, weight, bias, state, new_lengths, activation=activation)

    return {torch.ops.gqa.linear_attention.default: linear, torch.ops.gqa.causal_conv.default: conv}


def _neutral(op: StateOp, name: str, like: Any) -> Any:
    """What stands in ONNX for an optional input that is None: one element, of the type of `like`."""
    import onnx
    from onnxscript import opset23

    port = op.inputs[op.input_index(name)]
    return opset23.Constant(value=onnx.helper.make_tensor(name, int(like.dtype), [1] * len(port.shape), [port.neutral]))
