"""Inputs for LoRA adapters in a lowered graph: two small products beside a linear module's own, empty by default.

An adapted module answers W x + B (A x). A and B are initializers that are inputs too, so that a runtime may replace
them for a run (ONNX Runtime's `LoraAdapter`); as they stand in the graph their rank is 0, the sum over nothing is 0,
and the answer is that of the base model. They multiply in floats also where W is codes. Where several modules are one
product (packed query, key and value), their factors are one pair: the A side by side, the B on a diagonal of blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UnsupportedModel
from ..graph_io import RECIPE
from ..quantized.facts import SEPARATOR

if TYPE_CHECKING:
    import onnx

FIRST, SECOND = ".lora_A", ".lora_B"


@dataclass(frozen=True)
class AdapterSlot:
    """A product that takes an adapter. name: what its two inputs begin with. parts: the modules in it, in order, each
    with the rows of its weight. width: of x."""

    name: str
    parts: tuple[tuple[str, int], ...]
    width: int


def add_adapter_inputs(model: onnx.ModelProto, modules: Collection[str], shapes: Mapping[str, tuple[int, ...]],
                       tied: Sequence[tuple[str, ...]] = ()) -> list[AdapterSlot]:
    """Give a lowered graph the inputs of adapters, in place.

    Args:
        model: lowered, weights still recipes.
        modules: names of the modules that any adapter changes.
        shapes: of every weight of the model, by its name.
        tied: groups of names of one weight.

    Returns:
        The places, in the graph's order.

    Raises:
        UnsupportedModel: a module is not a product with a weight as it is stored.
    """
    wanted = {f"{name}.weight": name for name in modules}
    for group in tied:  # the graph may use another name of the same weight
        for name in group:
            if name in wanted:
                wanted.update(dict.fromkeys(group, wanted[name]))
    recipes = {tensor.name: _recipe(tensor) for tensor in model.graph.initializer}
    derived: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type in ("Transpose", "DequantizeLinear"):
            source = derived.get(node.input[0], node.input[0])
            if source in recipes:
                derived[node.output[0]] = source
    slots, nodes = [], []
    for node in model.graph.node:
        nodes.append(node)
        weight = _weight_of(node, derived)
        names = recipes.get(weight, ())
        if not any(name in wanted for name in names):
            continue
        parts = tuple((wanted.get(name, name.removesuffix(".weight")), shapes[name][0]) for name in names)
        stem = wanted[names[0]] if len(names) == 1 else weight.removesuffix(".weight")
        slot = AdapterSlot(stem, parts, shapes[names[0]][1])
        nodes += _add(model, node, slot)
        slots.append(slot)
    missing = sorted(set(modules) - {part for slot in slots for part, _ in slot.parts})
    if missing:
        raise UnsupportedModel(f"the graph has no product of its own for {', '.join(missing[:3])}, so an adapter "
                               "cannot be switched there", "--lora", "merge the adapter with --merge-lora",
                               code="E-MODEL-LORA-GRAPH")
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return slots


def _recipe(tensor: onnx.TensorProto) -> tuple[str, ...]:
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    parts = location.removeprefix(RECIPE).split("+") if location.startswith(RECIPE) else []
    return tuple(part.partition(SEPARATOR)[0] for part in parts)


def _weight_of(node: onnx.NodeProto, derived: Mapping[str, str]) -> str:
    """The weight [out, in], or its codes, that a node multiplies x by; "" where it does something else. derived: what
    is a weight's transpose, or its codes as numbers."""
    if node.op_type in ("FusedMatMul", "MatMulNBits"):
        return derived.get(node.input[1], str(node.input[1]))
    return derived.get(node.input[1], "") if node.op_type == "MatMul" else ""


def _add(model: onnx.ModelProto, node: onnx.NodeProto, slot: AdapterSlot) -> list[onnx.NodeProto]:
    """The nodes that add an adapter's part to what `node` gives."""
    from onnx import TensorProto, helper

    element = next(value.type.tensor_type.elem_type for value in model.graph.output if value.name == "logits")
    rows = sum(size for _, size in slot.parts)
    first, second = slot.name + FIRST, slot.name + SECOND
    for name, shape in ((first, (slot.width, 0)), (second, (0, rows))):
        # the rank is an axis without a name: it differs from place to place
        free = [size or None for size in shape]
        model.graph.input.append(helper.make_tensor_value_info(name, element, free))
        model.graph.initializer.append(TensorProto(name=name, data_type=element, dims=shape, raw_data=b""))
    answer, base = node.output[0], f"{slot.name}.lora/base"
    node.output[0] = base
    inner, outer = f"{slot.name}.lora/inner", f"{slot.name}.lora/outer"
    return [helper.make_node("MatMul", [node.input[0], first], [inner], f"{slot.name}.lora/MatMul_0"),
            helper.make_node("MatMul", [inner, second], [outer], f"{slot.name}.lora/MatMul_1"),
            helper.make_node("Add", [base, outer], [answer], f"{slot.name}.lora/Add_0")]
