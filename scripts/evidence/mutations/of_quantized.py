"""Damage to what is quantized: codes, zero points, scales, blocks, the order of columns, levels, cache codes."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from evidence.mutations.mutation import Broken, Mutation, NotHere
from gqa_export.graph_io import present_names

PRODUCT, GATHER = "MatMulNBits", "GatherBlockQuantized"


def _product(broken: Broken, bits: int = 4) -> onnx.NodeProto:
    """A product of layer 1 with codes of so many bits."""
    for node in broken.nodes:
        if node.op_type == PRODUCT and "layers.1.self_attn.o_proj" in node.name and _int(node, "bits") == bits:
            return node
    raise NotHere("a quantized product")


def _int(node: onnx.NodeProto, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)


def _scales(broken: Broken, node: onnx.NodeProto) -> str:
    """The initializer of a product's scales, which may be cast."""
    name = node.input[2]
    if any(tensor.name == name for tensor in broken.model.graph.initializer):
        return name
    return broken.maker(name).input[0]


def _expert(broken: Broken, number: int) -> onnx.NodeProto:
    """The first product of an expert of layer 1."""
    for node in broken.nodes:
        if node.op_type == PRODUCT and "layers.1." in node.name and f"[{number}/" in node.name:
            return node
    raise NotHere("experts that are quantized")


def experts_exchanged(broken: Broken) -> None:
    """Codes and scales of two experts exchanged, as a wrong order of the stack would."""
    first, second = _expert(broken, 0), _expert(broken, 1)
    for one, other in ((first.input[1], second.input[1]), (_scales(broken, first), _scales(broken, second))):
        values = broken.read(one)
        broken.write(one, broken.read(other))
        broken.write(other, values)


def scale_of_another_expert(broken: Broken) -> None:
    """An expert's codes with the scales of the next."""
    broken.write(_scales(broken, _expert(broken, 0)), broken.read(_scales(broken, _expert(broken, 1))))


def rows_not_put_back(broken: Broken) -> None:
    """What experts give stays in the order of the experts, and is taken for that of the tokens."""
    if not any("layers.1." in node.name and "[0/" in node.name for node in broken.nodes):
        raise NotHere("experts that are quantized")
    gather = next((node for node in broken.nodes if node.op_type == "Gather" and "layers.1." in node.name
                   and node.name.endswith("/in_order")), None)
    if gather is None:
        raise NotHere("rows that are sorted by their expert")
    gather.input[1] = broken.maker(gather.input[1]).input[0]


def nibbles_swapped(broken: Broken) -> None:
    """The later code of a byte taken for the earlier one."""
    name = _product(broken).input[1]
    codes = broken.read(name)
    broken.write(name, codes >> 4 | codes << 4)


def zero_points_off_by_one(broken: Broken) -> None:
    """Zero points of GPTQ's first version, which stores them less one, taken for the second's."""
    node = _product(broken)
    codes = broken.read(node.input[1])
    if len(node.input) > 3 and node.input[3]:
        zeros = broken.read(node.input[3])
        broken.write(node.input[3], zeros - np.uint8(0x11))
        return
    zeros = np.full((codes.shape[0], -(-codes.shape[1] // 2)), 0x77, np.uint8)
    node.input.append(broken.constant("broken/zeros", zeros))


def scale_transposed(broken: Broken) -> None:
    """Scales stored by block and read by row."""
    name = _scales(broken, _product(broken))
    scales = broken.read(name)
    if 1 in scales.shape:
        raise NotHere("a matrix of several blocks")
    broken.write(name, np.ascontiguousarray(scales.T).reshape(scales.shape))


def block_halved(broken: Broken) -> None:
    """Half the columns of a block with each scale: the first half of the scales serves all."""
    name = _scales(broken, _product(broken))
    scales = broken.read(name)
    if scales.shape[1] < 2:
        raise NotHere("a matrix of several blocks")
    broken.write(name, np.repeat(scales, 2, axis=1)[:, : scales.shape[1]])


def last_block_lost(broken: Broken) -> None:
    """A last block with fewer columns than the others, dropped by a division that rounds down."""
    for node in broken.nodes:
        if node.op_type == PRODUCT and _int(node, "K") % _int(node, "block_size"):
            name = _scales(broken, node)
            scales = broken.read(name)
            scales[:, -1] = 0
            broken.write(name, scales)
            return
    raise NotHere("a last block that is not full")


def column_order_dropped(broken: Broken) -> None:
    """Columns sorted by their group, and the activation not."""
    made = {node.output[0]: node for node in broken.nodes if node.op_type == "Gather"}
    constants = {tensor.name for tensor in broken.model.graph.initializer}
    for node in broken.nodes:
        gather = made.get(node.input[0]) if node.op_type == PRODUCT else None
        if gather is not None and gather.input[1] in constants:
            node.input[0] = gather.input[0]
            return
    raise NotHere("a matrix whose columns are sorted")


def global_scale_inverted(broken: Broken) -> None:
    """Divided by a scale that is to be multiplied, as one format has it and the other not."""
    name = _scales(broken, _product(broken))
    scales = broken.read(name)
    middle = np.float64(np.abs(scales).mean())
    broken.write(name, scales / middle * min(1 / middle, 1e3))


def embedding_default_zero(broken: Broken) -> None:
    """The embedding's zero points left to the operator's default, which differs by provider."""
    for node in broken.nodes:
        if node.op_type == GATHER and len(node.input) > 3 and node.input[3]:
            broken.write(node.input[3], np.zeros_like(broken.read(node.input[3])))
            return
    raise NotHere("a quantized embedding with zero points")


def level_raised(broken: Broken) -> None:
    """Activations rounded where the manifest promises that they are not."""
    quantization = broken.manifest.quantization
    if quantization is None or quantization.activations != "exact":
        raise NotHere("exact activations")
    for node in broken.model.graph.node:
        for attribute in node.attribute:
            if node.op_type == PRODUCT and attribute.name == "accuracy_level":
                attribute.i = 4


def nan_hidden(broken: Broken) -> None:
    """NaN, which marks a row that must not be read, set before a product of level 4, whose kernel makes zeros of it."""
    head = next((node for node in broken.nodes if node.op_type == PRODUCT and "lm_head" in node.name), None)
    if head is None:
        raise NotHere("a quantized head")
    guard = next((node for node in broken.nodes if node.op_type == "Where" and head.output[0] in node.input), None)
    if guard is None:  # it marks the input
        read, zero = head.input[0], broken.constant("broken/zero", np.array(0, np.float32))
        head.input[0] = "broken/hidden"
        broken.before(head, helper.make_node("IsNaN", [read], ["broken/isnan"]),
                      helper.make_node("Where", ["broken/isnan", zero, read], ["broken/hidden"]))
        return
    head.output[0] = guard.output[0]
    broken.model.graph.node.remove(guard)


def cache_scales_exchanged(broken: Broken) -> None:
    """The scale of a layer's keys for its values: in the operator, or in the nodes around what writes the cache."""
    if broken.manifest.kv_cache is None:
        raise NotHere("a quantized cache")
    around = [node for node in broken.nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear")
              and "layers.1.self_attn" in node.name and len(node.input) > 2]
    if not around:
        node = broken.attention(1)
        node.input[12], node.input[13] = node.input[13], node.input[12]
    for op in {node.op_type for node in around}:
        key, value = (node for node in around if node.op_type == op)
        key.input[1], value.input[1] = value.input[1], key.input[1]


def cache_clipped(broken: Broken) -> None:
    """Codes of a cache clipped at -127: the least one is lost."""
    if broken.manifest.kv_cache is None or broken.manifest.kv_cache.bits != 8:
        raise NotHere("a cache of int8 codes")
    for layer in broken.manifest.spec.layers:
        for name in present_names(layer.layer):
            least = broken.constant(f"broken/{name}/least", np.array(-127, np.int32))
            back = broken.after(name, "Cast", [f"{name}/clipped"], {"to": TensorProto.INT8})
            back.name = f"{name}/broken/Cast"
            broken.before(
                back, helper.make_node("Cast", [f"{name}/unbroken"], [f"{name}/wide"], to=TensorProto.INT32),
                helper.make_node("Max", [f"{name}/wide", least], [f"{name}/clipped"]))


MUTATIONS: tuple[Mutation, ...] = (
    Mutation("nibbles swapped", "the two codes of a byte in the other order", nibbles_swapped),
    Mutation("zero points off by one", "GPTQ's two versions of zero points exchanged", zero_points_off_by_one),
    Mutation("scale transposed", "scales of blocks read as scales of rows", scale_transposed),
    Mutation("block size halved", "a scale for half the columns that it belongs to", block_halved),
    Mutation("last padded block", "a last block that is not full, lost", last_block_lost),
    Mutation("column order dropped", "columns sorted by group, the activation not", column_order_dropped),
    Mutation("global scale inverted", "divided by a scale in place of multiplied", global_scale_inverted),
    Mutation("embedding default zero point", "zero points left to a default that differs by provider",
             embedding_default_zero, -1),
    Mutation("level 4 where 0 was promised", "activations rounded, and the manifest calls them exact", level_raised,
             -1),
    Mutation("NaN hidden by level 4", "a row that must not be read answered with plausible numbers", nan_hidden, -1),
    Mutation("experts exchanged", "the matrices of two experts exchanged", experts_exchanged),
    Mutation("scale of another expert", "an expert's codes with the next one's scales", scale_of_another_expert),
    Mutation("rows not put back", "rows left in the order of the experts that they chose", rows_not_put_back),
    Mutation("cache scales exchanged", "a layer's two scales of a quantized cache exchanged", cache_scales_exchanged),
    Mutation("cache code clipped", "codes of a quantized cache clipped at -127", cache_clipped, -1),
)
