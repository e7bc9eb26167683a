"""A model of one `gqa::GroupedQueryAttention` call, fresh inputs for it, and its fp64 truth. Dimensions as in the
contract."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import onnx
import torch
from gqa_plugins.grouped_attention.reference import grouped_query_attention
from onnx import TensorProto, helper

from gqa_export import attention_op


@dataclass(frozen=True)
class Attributes:
    """The op's attributes, with defaults for tests only."""

    num_heads: int = 6
    kv_num_heads: int = 2
    scale: float = 0.3
    softcap: float = 0.0
    window: int = 0
    rotary_interleaved: int = 0
    growing: int = 1


def op_model(attributes: Attributes, dtype: int = TensorProto.FLOAT, opset: int = 23) -> onnx.ModelProto:
    """The call alone, without a function, every input but cos and sin given; shapes left open."""
    given = [port for port in attention_op.INPUTS if port.name not in ("cos", "sin")]
    inputs = [helper.make_tensor_value_info(port.name, TensorProto.INT32 if port.type == "int32" else dtype,
                                            [None] * len(port.shape)) for port in given]
    outputs = [helper.make_tensor_value_info(port.name, dtype, [None] * len(port.shape))
               for port in attention_op.OUTPUTS]
    names = [port.name for port in given]
    node = helper.make_node(attention_op.OP, [name if name in names else "" for name in attention_op.INPUT_NAMES],
                            list(attention_op.OUTPUT_NAMES), name="call", domain=attention_op.DOMAIN,
                            **asdict(attributes))
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(attention_op.DOMAIN, attention_op.VERSION)]
    graph = helper.make_graph([node], "one_op", inputs, outputs)
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def fresh_inputs(attributes: Attributes, past: list[int], new: list[int], *, axis: int, steps: int, head: int = 8,
                 value_head: int = 8, seed: int = 0, sinks: bool = False, dtype: type = np.float32,
                 poison: bool = True) -> dict[str, np.ndarray]:
    """Random inputs with past axis `axis` and S = `steps`. With `poison`, whatever is not a valid token is NaN."""
    random, batch = np.random.default_rng(seed), len(past)
    heads, kv_heads = attributes.num_heads, attributes.kv_num_heads

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(dtype)

    feeds = {
        "query": draw(batch, steps, heads * head), "key": draw(batch, steps, kv_heads * head),
        "value": draw(batch, steps, kv_heads * value_head), "past_key": draw(batch, kv_heads, axis, head),
        "past_value": draw(batch, kv_heads, axis, value_head), "past_lengths": np.array(past, np.int32),
        "new_lengths": np.array(new, np.int32),
        "sinks": draw(heads) if sinks else np.full(heads, -np.inf, dtype),
    }
    if poison:
        for b in range(batch):
            feeds["past_key"][b, :, past[b]:] = feeds["past_value"][b, :, past[b]:] = np.nan
            feeds["query"][b, new[b]:] = feeds["key"][b, new[b]:] = feeds["value"][b, new[b]:] = np.nan
    return feeds


def truth(attributes: Attributes, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The op in fp64: output, present_key, present_value."""
    wide = {name: torch.from_numpy(x if x.dtype == np.int32 else x.astype(np.float64)) for name, x in feeds.items()}
    results = grouped_query_attention(*[wide.get(name) for name in attention_op.INPUT_NAMES], **asdict(attributes))
    return [tensor.numpy() for tensor in results]


def session(model: onnx.ModelProto):
    """An ONNX Runtime CPU session of a model without external data, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def assert_same(actual: list[np.ndarray], expected: list[np.ndarray], feeds: dict[str, np.ndarray], *,
                atol: float, rtol: float = 0.0) -> None:
    """Outputs alike with NaN in the same places; caches alike where a valid token lies (shapes in full)."""
    np.testing.assert_allclose(actual[0], expected[0], atol=atol, rtol=rtol, err_msg="output")
    ends = feeds["past_lengths"] + feeds["new_lengths"]
    for name, mine, theirs in zip(("present_key", "present_value"), actual[1:], expected[1:]):
        assert mine.shape == theirs.shape, name
        for b, end in enumerate(ends):
            np.testing.assert_array_equal(mine[b, :, :end], theirs[b, :, :end].astype(mine.dtype), err_msg=name)
