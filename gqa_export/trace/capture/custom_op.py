"""The torch op `gqa::grouped_query_attention` that a trace records: eager implementation, fake, ONNX translation.

The eager implementation is the plugin package's reference, so a traced model can be run and compared before any
ONNX exists. Signature, order and attributes are those of `gqa_export.attention_op`.
"""

from __future__ import annotations

from typing import Any

import torch
from gqa_plugins.grouped_attention import reference
from torch import Tensor

from ... import attention_op


@torch.library.custom_op("gqa::grouped_query_attention", mutates_args=())
def grouped_query_attention(
    query: Tensor, key: Tensor | None, value: Tensor | None, past_key: Tensor, past_value: Tensor,
    past_lengths: Tensor, new_lengths: Tensor, cos: Tensor | None, sin: Tensor | None, sinks: Tensor | None,
    num_heads: int, kv_num_heads: int, scale: float, softcap: float, window: int, rotary_interleaved: int,
    growing: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op, functionally; see `attention_op` for shapes. No attribute has a default: torch.export strips those."""
    return reference.grouped_query_attention(
        query, key, value, past_key, past_value, past_lengths, new_lengths, cos, sin, sinks, num_heads=num_heads,
        kv_num_heads=kv_num_heads, scale=scale, softcap=softcap, window=window,
        rotary_interleaved=rotary_interleaved, growing=growing)


@grouped_query_attention.register_fake
def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, past_key: torch.Tensor, past_value: torch.Tensor,
          past_lengths: torch.Tensor, new_lengths: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None,
          sinks: torch.Tensor | None, num_heads: int, kv_num_heads: int, scale: float, softcap: float, window: int,
          rotary_interleaved: int, growing: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, new, _ = query.shape
    value_size = past_value.shape[-1]
    total = past_key.shape[2] + new if growing == 1 else past_key.shape[2]
    return (query.new_empty(batch, new, num_heads * value_size),
            past_key.new_empty(past_key.shape[0], kv_num_heads, total, past_key.shape[-1]),
            past_value.new_empty(past_value.shape[0], kv_num_heads, total, value_size))


def onnx_schema() -> Any:
    """The op's ONNX schema, made from the contract (onnx.defs.OpSchema)."""
    from onnx.defs import OpSchema

    types = {"int": OpSchema.AttrType.INT, "float": OpSchema.AttrType.FLOAT}
    optional, single = OpSchema.FormalParameterOption.Optional, OpSchema.FormalParameterOption.Single
    kinds = {"T": "T", "int32": "tensor(int32)"}
    return OpSchema(
        attention_op.OP, attention_op.DOMAIN, attention_op.VERSION,
        inputs=[OpSchema.FormalParameter(p.name, kinds[p.type], p.meaning, param_option=optional if p.optional
                                         else single) for p in attention_op.INPUTS],
        outputs=[OpSchema.FormalParameter(p.name, kinds[p.type], p.meaning) for p in attention_op.OUTPUTS],
        attributes=[OpSchema.Attribute(a.name, types[a.type], a.meaning, required=True)
                    for a in attention_op.ATTRIBUTES],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"], "")])


def translation_table() -> dict[Any, Any]:
    """What `torch.onnx.export(custom_translation_table=...)` needs to write the op as `gqa::GroupedQueryAttention`."""
    import onnxscript

    domain = onnxscript.values.Opset(attention_op.DOMAIN, attention_op.VERSION)
    onnx_op = onnxscript.values.Op(domain, attention_op.OP, onnx_schema())

    # no types for the tensors: the exporter tells attributes from inputs by the parameters that have one
    def translate(query, key, value, past_key, past_value,  # type: ignore[no-untyped-def]
                  past_lengths, new_lengths, cos, sin, sinks, num_heads: int, kv_num_heads: int, scale: float,
                  softcap: float, window: int, rotary_interleaved: int, growing: int):
        return onnx_op(query, key, value, past_key, past_value, past_lengths, new_lengths, cos, sin, sinks,
                       num_heads=num_heads, kv_num_heads=kv_num_heads, scale=scale, softcap=softcap, window=window,
                       rotary_interleaved=rotary_interleaved, growing=growing)

    return {torch.ops.gqa.grouped_query_attention.default: translate}
