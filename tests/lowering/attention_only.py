"""A canonical model that is attention and nothing else, in milliseconds: q, k, v are looked up by token id.

Its logits are the op's output, so what a target computes can be held against the op's truth directly. Dimensions as
in `gqa_export.attention_op`.
"""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gqa_export import attention_op, graph_io
from gqa_export.lowering.context import Lowered, LowerOptions
from gqa_export.lowering.lower import lower
from gqa_export.runtime.feeds import attention_mask
from gqa_export.spec import AttentionSpec, ModelSpec

from .one_op import Attributes, session, truth

TOKENS = 40


class AttentionOnly:
    """The model for some attributes, its lowering, and a run of several steps beside the fp64 truth."""

    def __init__(self, attributes: Attributes, target: str, *, head: int = 8, value_head: int = 8,
                 sinks: bool = False, capacity: int = 16, dtype: type = np.float32, seed: int = 0) -> None:
        self.attributes, self.capacity, self.dtype = attributes, capacity, dtype
        heads, kv_heads = attributes.num_heads, attributes.kv_num_heads
        random = np.random.default_rng(seed)
        self.tables = {name: random.standard_normal((TOKENS, size)).astype(dtype) for name, size in
                       (("query", heads * head), ("key", kv_heads * head), ("value", kv_heads * value_head))}
        self.sinks = random.standard_normal(heads).astype(dtype) if sinks else np.full(heads, -np.inf, dtype)
        self.sizes = (head, value_head)
        self.spec = ModelSpec("attention", "AttentionOnly", heads * value_head, 1, 99, "", (AttentionSpec(
            0, heads, kv_heads, head, value_head, attributes.scale, attributes.softcap, attributes.window, sinks),))
        self.mode = "growing" if attributes.growing else "static"
        self.lowered: Lowered = lower(self.canonical(), self.spec, LowerOptions(target, self.mode, capacity))
        self.session = session(self.lowered.model)

    def canonical(self) -> onnx.ModelProto:
        """The canonical model; its weights are inline."""
        element = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        values = {**self.tables, "sinks": self.sinks, "zero": np.array([0]), "one": np.array([1]),
                  "far": np.array([2 ** 62])}
        nodes = [
            helper.make_node("Shape", ["input_ids"], ["steps"], start=1, end=2),
            helper.make_node("Neg", ["steps"], ["start"]),
            helper.make_node("Slice", ["attention_mask", "start", "far", "one"], ["new_mask"]),
            helper.make_node("ReduceSum", ["new_mask", "one"], ["new"], keepdims=0),
            helper.make_node("ReduceSum", ["attention_mask", "one"], ["all"], keepdims=0),
            helper.make_node("Sub", ["all", "new"], ["past"]),
            helper.make_node("Cast", ["past"], ["past_lengths"], to=TensorProto.INT32),
            helper.make_node("Cast", ["new"], ["new_lengths"], to=TensorProto.INT32),
            *[helper.make_node("Gather", [name, "input_ids"], [f"new_{name}"]) for name in self.tables],
            helper.make_node(attention_op.OP, ["new_query", "new_key", "new_value", *graph_io.past_names(0),
                                           "past_lengths", "new_lengths", "", "", "sinks"],
                             [graph_io.LOGITS, *graph_io.present_names(0)], domain=attention_op.DOMAIN,
                             name="layers.0/GroupedQueryAttention_0", **asdict(self.attributes)),
        ]
        for number, node in enumerate(nodes):
            node.name = node.name or f"graph/{node.op_type}_{number}"
        dtype = np.dtype(self.dtype).name

        def info(facts):
            return [helper.make_tensor_value_info(fact.name, TensorProto.INT64 if fact.dtype == "int64" else element,
                                                  fact.shape) for fact in facts]

        graph = helper.make_graph(nodes, "attention", info(graph_io.graph_inputs(self.spec, dtype, self.mode)),
                                  info(graph_io.graph_outputs(self.spec, dtype, self.mode, "all")),
                                  [numpy_helper.from_array(value, name) for name, value in values.items()])
        imports = [helper.make_opsetid("", 23), helper.make_opsetid(attention_op.DOMAIN, attention_op.VERSION)]
        return helper.make_model(graph, opset_imports=imports, ir_version=10)

    def empty_cache(self, batch: int, tail: float) -> list[np.ndarray]:
        """Key and value caches without a valid token; a static one is full of +-`tail`."""
        random, axis = np.random.default_rng(1), 0 if self.attributes.growing else self.capacity
        shapes = [(batch, self.attributes.kv_num_heads, axis, size) for size in self.sizes]
        return [(tail * random.choice([-1.0, 1.0], shape)).astype(self.dtype) for shape in shapes]

    def run(self, cache: list[np.ndarray], past: np.ndarray, ids: np.ndarray, new: np.ndarray) -> list[np.ndarray]:
        """One step of the lowered model: output, present key, present value."""
        mask = attention_mask(past, new, cache[0].shape[2], ids.shape[1])
        return self.session.run(None, {graph_io.INPUT_IDS: ids, graph_io.ATTENTION_MASK: mask,
                                       **dict(zip(graph_io.past_names(0), cache))})

    def expected(self, cache: list[np.ndarray], past: np.ndarray, ids: np.ndarray,
                 new: np.ndarray) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        """The truth of that step, and the op's inputs."""
        feeds = {**{name: table[ids] for name, table in self.tables.items()}, "past_key": cache[0],
                 "past_value": cache[1], "past_lengths": past.astype(np.int32), "new_lengths": new.astype(np.int32),
                 "sinks": self.sinks}
        return truth(self.attributes, feeds), feeds
