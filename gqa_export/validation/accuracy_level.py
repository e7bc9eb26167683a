"""Quantized matrix products at both of their levels: exact, and with activations rounded to int8.

ONNX Runtime on a CPU computes a MatMulNBits of accuracy level 4 with its input rounded to int8, block by block, and
makes such a node of every DequantizeLinear + MatMul by itself. Whether an export means what the checkpoint means shows
only at level 0: there a product differs from PyTorch's by rounding. Dimensions: K columns of a weight.

Source: onnxruntime docs/ContribOperators.md (MatMulNBits), and runs of ONNX Runtime 1.31: the rule agrees to 1.2e-7.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from ..bundle.graph_file import read_graph
from ..bundle.manifest import Manifest
from ..graph_io import EXACT_PRODUCTS
from ..runtime.ort.loading import session_config
from .stand_in import stand_in

if TYPE_CHECKING:
    import onnx

PRODUCT, LEVEL, ROUNDED = "MatMulNBits", "accuracy_level", 4
LARGEST = 127.0
"""a block is rounded to multiples of its largest absolute value / LARGEST"""


def rounds_activations(folder: Path, manifest: Manifest) -> bool:
    """Whether ONNX Runtime rounds activations in a bundle as it is shipped. Read from the graph: the manifest comes
    from outside. What the runners set for DequantizeLinear is read from the manifest, because they read it there."""
    graph = read_graph(folder).graph
    exact = session_config(manifest) == EXACT_PRODUCTS
    return any(_level(node) == ROUNDED for node in products(graph)) or (not exact and _dequantizes(graph))


@contextmanager
def at_level_zero(folder: Path, manifest: Manifest) -> Iterator[tuple[Manifest, Path, int]]:
    """A bundle whose matrix products are exact: its manifest, its folder, the number of nodes that were changed. The
    bundle itself where there are none. It must be run with `EXACT_PRODUCTS`."""
    model = read_graph(folder)
    changed = 0
    for node in products(model.graph):
        for attribute in node.attribute:
            if attribute.name == LEVEL and attribute.i != 0:
                attribute.i = 0
                changed += 1
    if not changed:
        yield manifest, folder, 0
        return
    with stand_in(folder, manifest, model, "exact") as (ran, place):
        yield ran, place, changed


def products(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every quantized matrix product of a graph, at any depth."""
    for node in graph.node:
        if node.op_type == PRODUCT and node.domain == "com.microsoft":
            yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from products(inner)


def _level(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == LEVEL), 0)


def _dequantizes(graph: onnx.GraphProto) -> bool:
    """Whether a matrix product takes what a DequantizeLinear gives."""
    made = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return any(node.op_type == "MatMul" and node.input[1] in made for node in graph.node)


def rounded_blocks(manifest: Manifest, model: Any) -> dict[int, int]:
    """id of a parameter -> columns of a block, of every weight whose product rounds its input, as the manifest has
    it."""
    found = {}
    quantization = manifest.quantization
    for weight in quantization.weights if quantization is not None and quantization.activations == "int8" else ():
        if weight.block and {PRODUCT, "DequantizeLinear"} & {name.strip() for name in weight.operator.split(",")}:
            found[id(model.get_parameter(weight.name))] = weight.block
    return found


class RoundInputs(TorchFunctionMode):
    """Inside, the input of a linear layer is rounded to int8 in every row and block of K, as level 4 does it: the
    baseline of a bundle that rounds. blocks: `rounded_blocks`. Every value stays of its own type."""

    def __init__(self, blocks: Mapping[int, int]) -> None:
        super().__init__()
        self._blocks = blocks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and id(args[1]) in self._blocks:
            args = (rounded(args[0], self._blocks[id(args[1])]), *args[1:])
        return func(*args, **(kwargs or {}))


def rounded(values: torch.Tensor, block: int) -> torch.Tensor:
    """[.., K] rounded to int8 in blocks of the last axis: multiples of the block's largest / 127, ties to even. A NaN
    stays one; ONNX Runtime's kernels make a zero of it, or not, as it falls into their registers."""
    columns = values.shape[-1]
    padded = torch.nn.functional.pad(values, (0, -columns % block)).unflatten(-1, (-1, block))
    step = padded.abs().amax(-1, keepdim=True) / LARGEST
    values = torch.where(step == 0, torch.zeros_like(padded), torch.round(padded / step) * step)
    return values.flatten(-2)[..., :columns]
