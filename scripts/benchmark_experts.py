"""How experts with quantized matrices can be computed on a CPU: what decided how `gqa-export` does it.

    python scripts/benchmark_experts.py

A layer of gated experts in ONNX Runtime, one thread, CPU milliseconds, in four ways: matrices of fp32 picked by index,
as the graph of an unquantized model has it; codes picked by index and dequantized (GatherBlockQuantized); QMoE; and
rows sorted by their expert and split, each expert with a MatMulNBits of its own. The outputs are compared with fp64.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

OUT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "experts.json"
SHAPES = ((32, 4, 1024, 512),)
"""experts, of which a token chooses so many, width of the model, of an expert"""
TOKENS, BITS, BLOCK, REPEAT = (1, 32), (4, 8), 32, 7
WAYS = ("picked fp32", "picked codes", "QMoE", "split, exact", "split")


class Layer:
    """Random experts, tokens and choices, and a graph that is being made. gate_up, down: codes `[E, N, K]`, scales."""

    def __init__(self, shape: tuple[int, int, int, int], tokens: int, bits: int) -> None:
        self.experts, self.chosen, self.width, self.inner = shape
        self.bits, self.middle, random = bits, 1 << bits - 1, np.random.default_rng(0)

        def matrices(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
            codes = random.integers(0, 1 << bits, (self.experts, rows, columns)).astype(np.uint8)
            return codes, random.uniform(0.001, 0.02, (self.experts, rows, columns // BLOCK)).astype(np.float32)

        self.gate_up, self.down = matrices(2 * self.inner, self.width), matrices(self.width, self.inner)
        self.x = random.standard_normal((tokens, self.width)).astype(np.float32)
        self.scores = random.standard_normal((tokens, self.experts)).astype(np.float32)
        self.ids = np.argsort(-self.scores, 1)[:, : self.chosen].astype(np.int64)
        shares = np.exp(np.take_along_axis(self.scores, self.ids, 1))
        self.shares = (shares / shares.sum(1, keepdims=True)).astype(np.float32)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def dense(self, matrix: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """The values of codes, fp32."""
        return (matrix[0].astype(np.float32) - self.middle) * np.repeat(matrix[1], BLOCK, 2)

    def packed(self, codes: np.ndarray) -> np.ndarray:
        """Codes of four bits two to a byte."""
        return codes if self.bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4

    def expected(self) -> np.ndarray:
        """The layer in fp64."""
        gate_up, down, out = self.dense(self.gate_up), self.dense(self.down), np.zeros(self.x.shape)
        for token, place in np.ndindex(self.ids.shape):
            gate, up = np.split(gate_up[self.ids[token, place]].astype(np.float64) @ self.x[token], 2)
            inner = gate / (1 + np.exp(-gate)) * up
            out[token] += self.shares[token, place] * (down[self.ids[token, place]].astype(np.float64) @ inner)
        return out

    def add(self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> None:
        """A node."""
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))

    def keep(self, name: str, value: Any) -> str:
        """A constant."""
        if all(name != known.name for known in self.constants):
            self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def gated(self, product: Callable[[str, tuple[np.ndarray, np.ndarray], str, str], None]) -> None:
        """The layer around two products with experts: product(name, matrices, input, output)."""
        last, axis = self.keep("last", [-1]), self.keep("axis", [1])
        self.add("Reshape", ["ids", last], ["e"])
        self.add("Unsqueeze", ["x", axis], ["x1"])
        self.add("Tile", ["x1", self.keep("times", [1, self.chosen, 1])], ["xk"])
        self.add("Reshape", ["xk", self.keep("flat", [-1, self.width])], ["xs"])
        product("gate_up", self.gate_up, "xs", "both")
        self.add("Split", ["both", self.keep("halves", [self.inner, self.inner])], ["gate", "up"], axis=-1)
        self.add("QuickGelu", ["gate"], ["silu"], "com.microsoft", alpha=1.0)
        self.add("Mul", ["silu", "up"], ["inner"])
        product("down", self.down, "inner", "outer")
        self.add("Reshape", ["outer", self.keep("apart", [-1, self.chosen, self.width])], ["each"])
        self.add("Unsqueeze", ["shares", last], ["weights"])
        self.add("Mul", ["each", "weights"], ["weighted"])
        self.add("ReduceSum", ["weighted", axis], ["y"], keepdims=0)

    def picked(self, name: str, matrix: tuple[np.ndarray, np.ndarray], x: str, y: str, *, codes: bool) -> None:
        """Matrices picked by index, of fp32 or as codes that are dequantized then."""
        if codes:
            zeros = np.full(matrix[1].shape, self.middle, np.uint8)
            parts = [self.keep(f"{name}.codes", self.packed(matrix[0])), "e", self.keep(f"{name}.scale", matrix[1]),
                     self.keep(f"{name}.zero", self.packed(zeros))]
            self.add("GatherBlockQuantized", parts, [f"{name}.g"], "com.microsoft", bits=self.bits, block_size=BLOCK,
                     quantize_axis=2, gather_axis=0)
        else:
            self.add("Gather", [self.keep(f"{name}.w", self.dense(matrix)), "e"], [f"{name}.g"])
        self.add("Unsqueeze", [x, "last"], [f"{name}.x"])
        self.add("MatMul", [f"{name}.g", f"{name}.x"], [f"{name}.y"])
        self.add("Squeeze", [f"{name}.y", "last"], [y])

    def split(self, name: str, matrix: tuple[np.ndarray, np.ndarray], x: str, y: str, *, level: int) -> None:
        """Rows sorted by their expert, a product of each expert."""
        if name == "gate_up":
            self.add("Shape", ["e"], ["count"])
            self.add("Expand", [self.keep("one", 1), "count"], ["ones"])
            self.add("ScatterElements", [self.keep("none", np.zeros(self.experts, np.int64)), "e", "ones"], ["sizes"],
                     axis=0, reduction="add")
            self.add("TopK", ["e", "count"], ["sorted", "order"], axis=0, largest=0)
            self.add("TopK", ["order", "count"], ["places", "back"], axis=0, largest=0)
        _, rows, columns = matrix[0].shape
        self.add("Gather", [x, "order"], [f"{name}.x"])
        self.add("Split", [f"{name}.x", "sizes"], [f"{name}.x{e}" for e in range(self.experts)], axis=0)
        for e in range(self.experts):
            codes = self.packed(matrix[0][e]).reshape(rows, columns // BLOCK, -1)
            self.add("MatMulNBits", [f"{name}.x{e}", self.keep(f"{name}.codes{e}", codes),
                                     self.keep(f"{name}.scale{e}", matrix[1][e])], [f"{name}.y{e}"], "com.microsoft",
                     K=columns, N=rows, bits=self.bits, block_size=BLOCK, accuracy_level=level)
        self.add("Concat", [f"{name}.y{e}" for e in range(self.experts)], [f"{name}.y"], axis=0)
        self.add("Gather", [f"{name}.y", "back"], [y])

    def qmoe(self) -> None:
        """One operator: rows of gate and up in turn, the router's weights given."""
        turn = np.arange(2 * self.inner).reshape(2, -1).T.reshape(-1)
        parts = [self.keep("a", self.packed(self.gate_up[0][:, turn])), self.keep("as", self.gate_up[1][:, turn]), "",
                 self.keep("b", self.packed(self.down[0])), self.keep("bs", self.down[1]), *[""] * 7, "scores"]
        self.add("Exp", ["raw"], ["scores"])
        self.add("QMoE", ["x", "raw", *parts], ["y"], "com.microsoft", k=self.chosen, expert_weight_bits=self.bits,
                 block_size=BLOCK, activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0,
                 activation_beta=0.0, swiglu_limit=1e30, normalize_routing_weights=1)


def measure(way: str, shape: tuple[int, int, int, int], tokens: int, bits: int, work: Path) -> tuple[float, float]:
    """CPU milliseconds of a step, and the largest error beside fp64 by the largest output."""
    layer = Layer(shape, tokens, bits)
    if way == "QMoE":
        layer.qmoe()
    elif way.startswith("picked"):
        layer.gated(lambda *product: layer.picked(*product, codes=way == "picked codes"))
    else:
        layer.gated(lambda *product: layer.split(*product, level=0 if "exact" in way else 4))
    value = helper.make_tensor_value_info
    feeds = {"x": layer.x, **({"raw": layer.scores} if way == "QMoE" else {"ids": layer.ids, "shares": layer.shares})}
    inputs = [value(name, helper.np_dtype_to_tensor_dtype(each.dtype), list(each.shape))
              for name, each in feeds.items()]
    graph = helper.make_graph(layer.nodes, "layer", inputs, [value("y", TensorProto.FLOAT, None)], layer.constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, work / "m.onnx", save_as_external_data=True, location="m.bin")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(work / "m.onnx", options, providers=["CPUExecutionProvider"])
    (got,), times, wanted = session.run(None, feeds), [], layer.expected()
    for _ in range(REPEAT):
        start = time.process_time()
        session.run(None, feeds)
        times.append(1000 * (time.process_time() - start))
    for name in ("m.onnx", "m.bin"):
        (work / name).unlink()
    return statistics.median(times), float(np.abs(got - wanted).max() / np.abs(wanted).max())


@click.command()
def main() -> None:
    """Measure every way, write the result."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="gqa-experts-") as place:
        for shape in SHAPES:
            for bits in BITS:
                for tokens in TOKENS:
                    found = {way: measure(way, shape, tokens, bits, Path(place)) for way in WAYS}
                    rows.append({"shape": shape, "bits": bits, "tokens": tokens,
                                 "cpu_ms": {way: float(f"{ms:.3g}") for way, (ms, _) in found.items()},
                                 "error": {way: float(f"{error:.2g}") for way, (_, error) in found.items()}})
                    click.echo(json.dumps(rows[-1]))
    OUT.write_text(json.dumps({"date": date.today().isoformat(), "cpu": platform.processor() or platform.machine(),
                               "onnxruntime": onnxruntime.__version__, "block": BLOCK, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
