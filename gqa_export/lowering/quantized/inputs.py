"""What quantized products need of their inputs, made once for all products of one input: columns scaled and in the
order of the codes, sums over blocks, and codes of the weight's own type.

Inputs of FP8 are quantized and dequantized by standard operators, those of NVFP4 quantized by an operator of TensorRT's
own (`gqa_export.lowering.tensorrt.fp4_inputs`).
"""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ...graph import edit
from ...graph.known_shape import known_shape
from ...graph.node_builder import Nodes
from ...graph.rounded_inputs import DOMAIN, DYNAMIC, dynamic_attributes, number_attributes
from ...quantized.facts import MatrixFacts
from ...quantized.input_codes import InputCodes
from ..context import Context


class Inputs:
    """Makes them in a graph."""

    def __init__(self, graph: gs.Graph, context: Context) -> None:
        self.graph, self.element = graph, context.element
        self._made: dict[tuple[object, ...], gs.Tensor] = {}
        self._kept: list[gs.Tensor] = []
        self._scopes: Counter[str] = Counter()
        self._ranks: dict[int, int] = {}
        """of what was made here"""

    def fresh(self, scope: str) -> str:
        """The scope, or one like it if it was given before: a module that several layers share computes in one."""
        self._scopes[scope] += 1
        again = self._scopes[scope] - 1
        return f"{scope}_{again}" if again else scope

    def ordered(self, x: gs.Tensor, facts: MatrixFacts, scope: str) -> gs.Tensor:
        """x `[..., K]` times the matrix's column scales, its columns in the order of the codes."""
        for label, values in (("column_scale", facts.column_scale), ("column_order", facts.column_order)):
            if values is None:
                continue
            key = (id(x), label, hashlib.sha256(np.ascontiguousarray(values).tobytes()).digest())
            if key not in self._made:
                node = Nodes(self.graph, self.fresh(f"{scope}/{label}"))
                if label == "column_order":
                    order = edit.constant(node.scope, values.astype(np.int64))
                    made = node("gather", "Gather", x, order, axis=-1)
                else:
                    made = node("scaled", "Mul", x, edit.constant(node.scope, values, self.element))
                if x.shape is not None and len(x.shape) == 2:
                    made.shape, made.dtype = x.shape, x.dtype
                self._ranks[id(made)] = self._rank(x)
                self._keep(key, x, made)
            x = self._made[key]
        return x

    def sums(self, x: gs.Tensor, columns: int, block: int, scope: str) -> gs.Tensor:
        """`[..., ceil(K / block)]`: x summed over each block of columns."""
        key = (id(x), "sums", block)
        if key not in self._made:
            node, whole = Nodes(self.graph, self.fresh(f"{scope}/sums{block}")), x
            rank = self._rank(x)
            if columns % block:
                whole = node("padded", "Pad", x, [0] * (2 * rank - 1) + [-columns % block])
            # rows of an expert that no token chose are none, and then -1 cannot be told
            count = -(-columns // block) if rank == 2 else -1
            blocks = node("blocks", "Reshape", whole, [0] * (rank - 1) + [count, block])
            self._keep(key, x, node("sum", "ReduceSum", blocks, [-1], keepdims=0))
        return self._made[key]

    def _rank(self, x: gs.Tensor) -> int:
        """Axes of an input. Of most no shape is known, and they have three; routers and experts have rows of tokens."""
        return self._ranks.get(id(x)) or len(known_shape(x) or (0, 0, 0))

    def rounded(self, x: gs.Tensor, codes: InputCodes, scope: str) -> gs.Tensor:
        """x `[..., K]` rounded to codes, as numbers of its own type."""
        key = (id(x), codes)
        if key not in self._made:
            node = Nodes(self.graph, f"{scope}/input")
            made = self._fp8(node, x, codes) if codes.kind == "e4m3" else self._nvfp4(node, x, codes)
            self._keep(key, x, made)
        return self._made[key]

    def _fp8(self, node: Nodes, x: gs.Tensor, codes: InputCodes) -> gs.Tensor:
        """In fp32, as the weight is dequantized: TensorRT for RTX 1.7 refuses scales of two types in one product."""
        narrow = self.element != onnx.TensorProto.FLOAT
        scale = edit.constant(f"{node.scope}/scale", np.array(codes.scale, np.float32))
        zero = edit.constant(f"{node.scope}/zero", np.zeros((), np.float32), onnx.TensorProto.FLOAT8E4M3FN)
        wide = node("wide", "Cast", x, to=onnx.TensorProto.FLOAT) if narrow else x
        made = node("numbers", "DequantizeLinear", node("codes", "QuantizeLinear", wide, scale, zero), scale)
        return node("narrow", "Cast", made, to=self.element) if narrow else made

    def _nvfp4(self, node: Nodes, x: gs.Tensor, input_codes: InputCodes) -> gs.Tensor:
        scale = edit.constant(f"{node.scope}/scale", np.array(input_codes.scale, np.float32), self.element)
        codes, scales = edit.add_node(self.graph, DYNAMIC, [x, scale], name=f"{node.scope}/codes", domain=DOMAIN,
                                      outputs=2, attrs=dynamic_attributes())
        steps = node("steps", "DequantizeLinear", scales, scale)
        return node("numbers", "DequantizeLinear", codes, steps, **number_attributes())

    def _keep(self, key: tuple[object, ...], x: gs.Tensor, made: gs.Tensor) -> None:
        self._made[key] = made
        self._kept.append(x)  # ids of tensors that are gone would be given again
