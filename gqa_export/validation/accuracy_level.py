"""Quantized matrix products at both of their levels: exact, and with activations rounded to int8, or to the type of
their weight (`gqa_export.validation.input_codes`).

ONNX Runtime on a CPU computes a MatMulNBits of accuracy level 4 with its input rounded to int8, block by block, and
makes such a node of every DequantizeLinear + MatMul by itself. Whether an export means what the checkpoint means shows
only at level 0: there a product differs from PyTorch's by rounding. Dimensions: K columns of a weight.

Source: onnxruntime docs/ContribOperators.md (MatMulNBits), and runs of ONNX Runtime 1.31: the rule agrees to 1.2e-7.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from ..bundle.graph_file import read_graph
from ..bundle.manifest import Manifest
from ..checkpoint.expert_products import ExpertFactor, factor_of, follow
from ..checkpoint.quantized.parameters import parameters_of
from ..errors import InvalidBundle
from ..graph_io import EXACT_PRODUCTS
from ..quantized.facts import Form
from ..quantized.input_codes import InputCodes
from ..quantized.packing import Packer
from ..runtime.ort.loading import session_config
from ..targets import get_target
from .input_codes import SAME, bypass_inputs, rounded_to_codes, rounds_inputs
from .quantized_reference import form_of, parameter_of
from .stand_in import stand_in

if TYPE_CHECKING:
    import onnx

    from ..bundle.quantization import QuantizedWeight
    from ..checkpoint.checkpoint import Checkpoint
    from ..quantized.matrix import QuantizedMatrix
    from ..targets import Target

PRODUCT, LEVEL, ROUNDED = "MatMulNBits", "accuracy_level", 4
NO_CODES: Mapping[str, InputCodes] = MappingProxyType({})
LARGEST = 127.0
"""a block is rounded to multiples of its largest absolute value / LARGEST"""


def rounds_activations(folder: Path, manifest: Manifest) -> bool:
    """Whether products round their inputs in a bundle as it is shipped, or ONNX Runtime does. Read from the graph: the
    manifest comes from outside. What the runners set for DequantizeLinear is read from the manifest, because they read
    it there."""
    graph = read_graph(folder).graph
    exact = session_config(manifest) == EXACT_PRODUCTS
    return any(_level(node) == ROUNDED for node in products(graph)) or (
        not exact and _dequantizes(graph)) or rounds_inputs(graph)


@contextmanager
def at_level_zero(folder: Path, manifest: Manifest) -> Iterator[tuple[Manifest, Path, int]]:
    """A bundle whose matrix products are exact: its manifest, its folder, the number of products and of roundings of
    inputs that were changed. The bundle itself where there are none. It must be run with `EXACT_PRODUCTS`."""
    model = read_graph(folder)
    changed = 0
    for node in products(model.graph):
        for attribute in node.attribute:
            if attribute.name == LEVEL and attribute.i != 0:
                attribute.i = 0
                changed += 1
    changed += bypass_inputs(model.graph)
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


@dataclass(frozen=True, eq=False)
class RoundedInput:
    """How the product of a weight rounds its input in a bundle.

    Attributes:
        block: columns of a block, in the order of the codes.
        scale: `[K]`, what the input is multiplied by first. None: it is not.
        order: `[K]`: column j of the codes is column `order[j]` of the weight; `[E, K]` of experts that have one each.
            None: they are in order.
        shift: `[N, blocks]`, what is added for each block besides the symmetric codes, times the sum of the block's
            inputs, which are not rounded for it. None: nothing is.
        beside: `[N, K]`, the product of an adapter that can be switched, which the weight here contains and the graph
            computes beside it, of inputs that are not rounded. None: there is none.
        experts: matrices that are stacked in the weight, whose rows `shift` counts through; 0: it is one.
        codes: the type of the weight, to which it is rounded in place of int8. None: it is not.
    """

    block: int
    scale: torch.Tensor | None = None
    order: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    beside: torch.Tensor | None = None
    experts: int = 0
    codes: InputCodes | None = None

    def product(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What torch.nn.functional.linear (`func`) is by this rule."""
        others = dict(kwargs or {})
        values = args[0] if args else others.pop("input")
        seen, near, back = self._rounded(values, self.order)
        found = func(back, *args[1:], **others)
        if self.beside is not None:
            found = found + (values - back) @ self.beside.to(values.dtype).T
        return found if self.shift is None else found + self._lost(seen - near) @ self.shift.to(values.dtype).T

    def expert_product(self, func: Any, args: Any, kwargs: Any, factor: ExpertFactor) -> Any:
        """What a product with experts is by this rule."""
        values = args[factor.place].movedim(factor.axis, -1)
        index = factor.picked.index
        order = self.order if self.order is None or self.order.ndim == 1 or index is None else self.order[index]
        seen, near, back = self._rounded(values, order)
        factors = list(args)
        factors[factor.place] = back.movedim(-1, factor.axis)
        found = func(*factors, **(kwargs or {}))
        if self.shift is None:
            return found
        shift = self.shift.unflatten(0, (self.experts, -1)).to(values.dtype)
        shift = shift if index is None else shift[index]
        return found + (self._lost(seen - near) @ shift.mT).movedim(-1, factor.axis)

    def _rounded(self, values: torch.Tensor,
                 order: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """An input `[.., K]` in the order and scale of the codes, that rounded, and the latter as the weight has it.
        order: `[K]`, or `[.., K]` for rows `[.., rows, K]`."""
        seen = values if self.scale is None else values * self.scale.to(values.dtype)
        places = None
        if order is not None:
            places = (order if order.ndim == 1 else order.unsqueeze(-2)).expand_as(seen)
            seen = seen.gather(-1, places)
        near = rounded(seen, self.block) if self.codes is None else rounded_to_codes(seen, self.codes)
        back = near if places is None else torch.empty_like(near).scatter_(-1, places, near)
        return seen, near, back if self.scale is None else back / self.scale.to(values.dtype)

    def _lost(self, lost: torch.Tensor) -> torch.Tensor:
        """What rounding took from the sum of each block."""
        padded = torch.nn.functional.pad(lost, (0, -lost.shape[-1] % self.block))
        return padded.unflatten(-1, (-1, self.block)).sum(-1)


def rounded_inputs(manifest: Manifest, checkpoint: Checkpoint, model: Any,
                   codes: Mapping[str, InputCodes] = NO_CODES) -> dict[int, RoundedInput]:
    """id of a parameter -> how its product rounds its input, of every weight whose product does. The manifest tells
    which do; how their codes are held is read from the checkpoint.

    Args:
        manifest: of the bundle. checkpoint: that was exported. model: of it.
        codes: name of a weight -> the codes of its inputs, of a bundle whose inputs have their weight's type.

    Raises:
        InvalidBundle: the manifest names a weight, experts or blocks that the checkpoint does not have.
    """
    found: dict[int, RoundedInput] = {}
    quantization = manifest.quantization
    if quantization is None or quantization.activations == "exact":
        return found
    names = {name for name, _ in model.named_parameters()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = {weight.name for weight in quantization.weights if weight.kept(quantization.method)}
    kept = {name: matrix for name, matrix in parameters_of(checkpoint, names)[0].items() if name in own} if own else {}
    switched = _switched(manifest, checkpoint)
    looked_up = id(model.get_input_embeddings().weight)
    for weight in quantization.weights:
        if quantization.activations == SAME:
            if weight.name not in codes:
                continue
        elif weight.operator == "DequantizeLinear" and id(parameters.get(weight.name)) == looked_up:
            continue  # a head that is tied to it lies as the lookup needs it: ONNX Runtime makes no MatMulNBits of that
        if weight.block and {PRODUCT, "DequantizeLinear"} & {name.strip() for name in weight.operator.split(",")}:
            parameter, matrix = parameter_of(parameters, weight, checkpoint.source), kept.get(weight.name)
            rule = RoundedInput(weight.block) if matrix is None else \
                _input_of(matrix, weight, get_target(manifest.target), checkpoint.source)
            found[id(parameter)] = replace(rule, beside=switched.get(weight.name), experts=weight.experts,
                                           codes=codes.get(weight.name))
    return found


def _switched(manifest: Manifest, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Name of a weight -> what the checkpoint's adapter adds to it, where the bundle's adapters can be switched."""
    if checkpoint.adapter is None or not manifest.source.get("adapters"):
        return {}
    pairs = {name: module.factors() for name, module in checkpoint.adapter.modules.items()}
    return {f"{name}.weight": torch.from_numpy(up @ down) for name, (down, up) in pairs.items()}


def _input_of(matrix: QuantizedMatrix, weight: QuantizedWeight, target: Target, where: str) -> RoundedInput:
    block = weight.block
    form = form_of(matrix, target)
    order, scale = (None if values is None else torch.from_numpy(np.array(values))
                    for values in (matrix.column_order, matrix.column_scale))
    shift = None
    if isinstance(form, Form) and form.shift:
        packer = Packer(matrix, replace(form, half=False))
        shift = torch.from_numpy(np.concatenate([packer.pack(matrix.stripe(*rows), "shift")
                                                 for rows in matrix.stripes()]))
        if shift.shape[1] != -(-matrix.columns // block):
            raise InvalidBundle(f"the manifest names blocks of {block} columns in {weight.name}, the target holds what "
                                f"the checkpoint stores in blocks of {form.block}", where,
                                "validate against the checkpoint that was exported", code="E-BUNDLE-QUANTIZATION")
    return RoundedInput(block, scale, None if order is None else order.long(), shift)


class RoundInputs(TorchFunctionMode):
    """Inside, the input of a linear layer (and of experts) is rounded to int8 in every row and block of K, as level 4
    does it, or to the type of its weight: the baseline of a bundle that rounds. inputs: `rounded_inputs`. Every value
    stays of its own number format.

    Attributes:
        met: ids of the parameters whose products were met, and rounded. One that PyTorch reads in another way than a
            product is not: the baseline lacks its rounding.
    """

    def __init__(self, inputs: Mapping[int, RoundedInput]) -> None:
        super().__init__()
        self._inputs = inputs
        self.met: set[int] = set()
        self._stacks = {owner for owner, rule in inputs.items() if rule.experts}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
            if id(weight) in self._inputs:
                self.met.add(id(weight))
                return self._inputs[id(weight)].product(func, args, kwargs)
        factor = factor_of(func, args, self._stacks) if self._stacks else None
        if factor is not None:
            self.met.add(factor.picked.owner)
            return self._inputs[factor.picked.owner].expert_product(func, args, kwargs, factor)
        found = func(*args, **(kwargs or {}))
        if self._stacks:
            follow(func, args, found, self._stacks)
        return found


def rounded(values: torch.Tensor, block: int) -> torch.Tensor:
    """[.., K] rounded to int8 in blocks of the last axis: multiples of the block's largest / 127, ties to even. A NaN
    stays one; ONNX Runtime's kernels make a zero of it, or not, as it falls into their registers."""
    columns = values.shape[-1]
    padded = torch.nn.functional.pad(values, (0, -columns % block)).unflatten(-1, (-1, block))
    step = padded.abs().amax(-1, keepdim=True) / LARGEST
    values = torch.where(step == 0, torch.zeros_like(padded), torch.round(padded / step) * step)
    return values.flatten(-2)[..., :columns]
