"""Damage to codes that are floating-point numbers themselves: FP8 (e4m3) and NVFP4 (e2m1 under two scales)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from evidence.mutations.mutation import Broken, Mutation, NotHere

E4M3, E2M1 = TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1
SIGNS = 0x7F
"""of e4m3: all bits but the sign"""


def _codes(broken: Broken, kind: int) -> tuple[onnx.NodeProto, str]:
    """The DequantizeLinear of a matrix of layer 1 whose codes are of this type, and the name of the codes."""
    types = {tensor.name: tensor.data_type for tensor in broken.model.graph.initializer}
    for node in broken.nodes:
        if node.op_type == "DequantizeLinear" and "layers.1.self_attn.o_proj.weight/Deq" in node.name \
                and types.get(node.input[0]) == kind:
            return node, node.input[0]
    raise NotHere("codes of floating-point numbers")


def _bytes(broken: Broken, name: str) -> tuple[Path, int, np.ndarray]:
    """Where the bytes of a weight are, and those: two codes of four bits have one."""
    tensor = next(each for each in broken.model.graph.initializer if each.name == name)
    facts = {entry.key: entry.value for entry in tensor.external_data}
    path, offset = broken.folder / facts["location"], int(facts.get("offset", 0))
    return path, offset, np.fromfile(path, np.uint8, int(facts["length"]), offset=offset)


def _put(path: Path, offset: int, values: np.ndarray) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(values.tobytes())


def _scale(broken: Broken, node: onnx.NodeProto) -> str:
    """The initializer of a matrix's scales, which may be cast, or codes under a second scale."""
    name = node.input[1]
    if any(tensor.name == name for tensor in broken.model.graph.initializer):
        return name
    return broken.maker(name).input[0]


def float_signs_lost(broken: Broken) -> None:
    """The codes without their signs, as of a type that has none."""
    _, name = _codes(broken, E4M3)
    path, offset, codes = _bytes(broken, name)
    _put(path, offset, codes & np.uint8(SIGNS))


def float_bias_off(broken: Broken) -> None:
    """e4m3fn taken for e4m3fnuz, whose exponents count from one more: every value is half."""
    node, _ = _codes(broken, E4M3)
    scale = _scale(broken, node)
    broken.write(scale, broken.read(scale) * np.float32(0.5))


def float_nibbles_swapped(broken: Broken) -> None:
    """The later e2m1 of a byte taken for the earlier one."""
    _, name = _codes(broken, E2M1)
    path, offset, codes = _bytes(broken, name)
    _put(path, offset, codes >> 4 | codes << 4)


def second_scale_inverted(broken: Broken) -> None:
    """Divided by the scale of the whole matrix, by which compressed-tensors divides and ModelOpt multiplies."""
    node, _ = _codes(broken, E2M1)
    whole = broken.maker(node.input[1]).input[1]
    broken.write(whole, 1 / broken.read(whole))


def block_scales_of_the_next(broken: Broken) -> None:
    """Every block of 16 with the scale of the next."""
    node, _ = _codes(broken, E2M1)
    path, offset, scales = _bytes(broken, _scale(broken, node))
    _put(path, offset, np.roll(scales, -1))


FLOAT_MUTATIONS: tuple[Mutation, ...] = (
    Mutation("float signs lost", "FP8 codes read without their signs", float_signs_lost, -1),
    Mutation("float bias off", "FP8 of another bias (fn, fnuz)", float_bias_off, -1),
    Mutation("float nibbles swapped", "the two FP4 codes of a byte in the other order", float_nibbles_swapped,
             -1),
    Mutation("second scale inverted", "divided by NVFP4's second scale in place of multiplied", second_scale_inverted,
             -1),
    Mutation("block scales of the next", "NVFP4 blocks with their neighbours' scales", block_scales_of_the_next, -1),
)
