"""Damage to caches: codes of a cache written in standard operators, two codes in a byte, and a cache in place."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from evidence.mutations.mutation import Broken, Mutation, NotHere
from gqa_export.graph_io import past_names, present_names

L = 1
FLOAT, INT32, INT8 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT8


def _quantizers(broken: Broken) -> list[onnx.NodeProto]:
    """What makes codes of a layer's new keys and values in standard operators."""
    found = [node for node in broken.nodes if node.op_type == "QuantizeLinear"
             and f"layers.{L}.self_attn" in node.name]
    if broken.manifest.kv_cache is None or not found:
        raise NotHere("a cache whose codes standard operators make")
    return found


def cache_codes_cut_off(broken: Broken) -> None:
    """Codes are the whole number below, not the nearest."""
    for node in _quantizers(broken):
        values, scale = node.input[:2]
        node.input[0] = f"{values}/cut"
        broken.before(node, helper.make_node("Div", [values, scale], [f"{values}/steps"]),
                      helper.make_node("Floor", [f"{values}/steps"], [f"{values}/whole"]),
                      helper.make_node("Mul", [f"{values}/whole", scale], [f"{values}/cut"]))


def cache_codes_wrapped(broken: Broken) -> None:
    """What is beyond the largest code becomes one of the other sign."""
    for node in _quantizers(broken):
        values, scale = node.input[:2]
        broken.before(node, helper.make_node("Div", [values, scale], [f"{values}/steps"]),
                      helper.make_node("Round", [f"{values}/steps"], [f"{values}/whole"]),
                      helper.make_node("Cast", [f"{values}/whole"], [f"{values}/wide"], to=INT32))
        codes = node.output[0]
        node.output[0] = f"{codes}/clipped"  # the codes as they were are read by nothing
        broken.before(node, helper.make_node("Cast", [f"{values}/wide"], [codes], to=INT8))


def cache_read_by_another_scale(broken: Broken) -> None:
    """Keys and values are written by their own scales and read by the other's."""
    _quantizers(broken)
    key, value = (broken.node(f"layers.{L}.self_attn", f"/{kind}/", op="DequantizeLinear") for kind in ("key", "value"))
    key.input[1], value.input[1] = value.input[1], key.input[1]


def new_tokens_attended_unrounded(broken: Broken) -> None:
    """Attention reads new keys as they were before they became codes, and the cache holds the codes."""
    key = next((node for node in _quantizers(broken) if "/key/" in node.name), None)
    present = present_names(L)[0]
    reader = next((node for node in broken.nodes if node.op_type == "DequantizeLinear" and present in node.input), None)
    if key is None or reader is None or broken.manifest.cache != "growing":
        raise NotHere("a growing cache of codes that standard operators read")
    place = broken.maker(present)  # GatherND of past, new and zeros, one behind the other
    past, _, zeros = broken.maker(place.input[0]).input
    numbers, row = "broken/past", "broken/zeros"
    whole = helper.make_node("GatherND", ["broken/rows", place.input[1]], list(reader.output), batch_dims=2)
    broken.before(reader, helper.make_node("DequantizeLinear", [past, *reader.input[1:]], [numbers]),
                  helper.make_node("Cast", [zeros], [row], to=FLOAT),
                  helper.make_node("Concat", [numbers, key.input[0], row], ["broken/rows"], axis=2), whole)
    broken.model.graph.node.remove(reader)


def cache_nibbles_exchanged(broken: Broken) -> None:
    """The two codes of a byte in the other order, in what is written and in what is read: only who looks at the cache
    can tell."""
    kv = broken.manifest.kv_cache
    if kv is None or kv.bits != 4:
        raise NotHere("a cache of two codes to a byte")
    four = broken.constant("broken/four", np.array(4, np.uint8))
    reader, pasts = broken.maker(present_names(L)[0]), past_names(L)
    reader.input[:] = [f"{name}/exchanged" if name in pasts else name for name in reader.input]
    broken.before(reader, *(node for past in pasts for node in _exchange(past, f"{past}/exchanged", four)))
    for present in present_names(L):
        last = broken.after(present, "Identity", [f"{present}/exchanged"])
        last.name = f"{last.name}/{present}"
        broken.before(last, *_exchange(f"{present}/unbroken", f"{present}/exchanged", four))


def _exchange(name: str, out: str, four: str) -> tuple[onnx.NodeProto, ...]:
    return (helper.make_node("BitShift", [name, four], [f"{out}/up"], direction="LEFT"),
            helper.make_node("BitShift", [name, four], [f"{out}/down"], direction="RIGHT"),
            helper.make_node("BitwiseOr", [f"{out}/up", f"{out}/down"], [out]))


def newest_at_the_end(broken: Broken) -> None:
    """The newest token is sought in the last row of the cache: it is there until a buffer has more rows than tokens."""
    if broken.manifest.cache != "growing" or broken.manifest.kv_cache is not None:
        raise NotHere("a growing cache of numbers")
    past = past_names(L)[0]
    tensor = broken.node(f"layers.{L}.mlp.down_proj", "MatMul").output[0]
    layer = broken.manifest.spec.layers[L]
    numbers = {"zero": [0], "one": [1], "end": [1 << 40], "last": [-1], "axis": [2], "width": [1], "axes": [1, 2, 3],
               "scalar": [-1, 1, 1]}
    name = {key: broken.constant(f"broken/{key}", np.array(value, np.int64)) for key, value in numbers.items()}
    row = broken.constant("broken/row", np.zeros((1, layer.kv_num_heads, 1, layer.head_size), np.float32))
    nothing = broken.constant("broken/nothing", np.array(0, np.float32))
    added = broken.after(tensor, "Add", ["", "broken/gap"])
    broken.before(
        added, helper.make_node("Shape", ["input_ids"], ["broken/ids"]),
        helper.make_node("Shape", ["attention_mask"], ["broken/mask"]),
        helper.make_node("Slice", ["broken/ids", name["zero"], name["one"], name["zero"]], ["broken/batch"]),
        helper.make_node("Slice", ["broken/ids", name["one"], name["end"], name["zero"]], ["broken/new"]),
        helper.make_node("Slice", ["broken/mask", name["one"], name["end"], name["zero"]], ["broken/total"]),
        helper.make_node("Sub", ["broken/total", "broken/new"], ["broken/newest"]),  # after a row of zeros: no - 1
        helper.make_node("Concat", ["broken/batch", name["one"], name["one"], name["one"]], ["broken/whole"], axis=0),
        helper.make_node("Expand", [row, "broken/whole"], ["broken/first"]),
        helper.make_node("Concat", ["broken/first", past], ["broken/held"], axis=2),
        helper.make_node("Slice", ["broken/held", name["last"], name["end"], name["axis"]], ["broken/at_end"]),
        helper.make_node("Gather", ["broken/held", "broken/newest"], ["broken/true"], axis=2),
        helper.make_node("Sub", ["broken/at_end", "broken/true"], ["broken/apart_or_nan"]),
        helper.make_node("IsNaN", ["broken/apart_or_nan"], ["broken/garbage"]),  # padding of shorter rows
        helper.make_node("Where", ["broken/garbage", nothing, "broken/apart_or_nan"], ["broken/apart"]),
        helper.make_node("ReduceSum", ["broken/apart", name["axes"]], ["broken/sum"], keepdims=0),
        helper.make_node("Reshape", ["broken/sum", name["scalar"]], ["broken/gap"]))


CACHE_MUTATIONS: tuple[Mutation, ...] = (
    Mutation("cache codes cut off", "codes of a quantized cache rounded down", cache_codes_cut_off, -1),
    Mutation("cache codes wrapped", "codes of a quantized cache not clipped", cache_codes_wrapped, -1),
    Mutation("cache read by another scale", "a quantized cache read by other scales than it was written by",
             cache_read_by_another_scale, -1),
    Mutation("new tokens attended unrounded", "attention over numbers that the quantized cache does not hold",
             new_tokens_attended_unrounded, -1),
    Mutation("cache nibbles exchanged", "two codes of a byte of a cache in the other order", cache_nibbles_exchanged,
             -1),
    Mutation("newest at the end", "a buffer's last row taken for the newest token", newest_at_the_end, -1),
)
