"""What a manifest says of each quantized weight, held against the checkpoint, and of rounded inputs, against the graph.

A user chooses a bundle by it ("lossless"), and no number that a run compares shows it. What the codes of a weight must
be follows from the checkpoint alone: from its own codes, or from its numbers quantized again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..bundle.graph_file import read_graph
from ..bundle.manifest import MODEL, Manifest
from ..bundle.quantization import KEPT, PLAIN, QuantizedWeight
from ..checkpoint.quantized.parameters import parameters_of
from ..errors import InvalidBundle
from ..quantized.exactness import INSIDE, holds, holds_type, holds_values
from ..quantized.facts import E4M3, Form
from ..quantized.packing import Packer
from ..quantizing.rules import KINDS, METHODS
from ..targets import get_target
from ..weights.dtypes import itemsize
from .accuracy_level import LEVEL, ROUNDED, products
from .quantized_reference import form_of

if TYPE_CHECKING:
    import torch

    from ..checkpoint.checkpoint import Checkpoint
    from ..quantized.matrix import QuantizedMatrix

T = TypeVar("T")
MOST = 8
"""bytes that quantizing leaves of a number, at most"""
FLOATS = {*INSIDE, *(stored for kinds in INSIDE.values() for stored in kinds), "float64"}
"""types of numbers that a checkpoint may have"""
EIGHT_TOO = ("int4", "fp8", "nvfp4")
"""methods under which embedding and head have codes of eight bits"""


def check_levels(folder: Path, manifest: Manifest) -> None:
    """Hold what a manifest says of rounded inputs against the products of its graph.

    Raises:
        InvalidBundle: it says that they are rounded to int8, and one is not, or its target rounds none. (That one is
            rounded where the manifest says that none is shows in its numbers.)
    """
    if manifest.quantization is None or manifest.quantization.activations != "int8":
        return
    wrong = "" if get_target(manifest.target).runs_in_onnxruntime else f"target {manifest.target} never does that"
    for node in products(read_graph(folder).graph) if manifest.parallel is None else ():
        level = next((attribute.i for attribute in node.attribute if attribute.name == LEVEL), 0)
        if level != ROUNDED:
            wrong = f"node {node.name[:200]!r} has accuracy level {level}, expected {ROUNDED}"
            break
    if wrong:
        raise InvalidBundle(f"products round their inputs to int8 by the manifest, and {wrong}", str(folder / MODEL),
                            "model.onnx and gqa_export.json belong to different exports: export again",
                            code="E-BUNDLE-CLAIM")


def check_weights_are_as_stated(checkpoint: Checkpoint, manifest: Manifest, parameters: Mapping[str, torch.Tensor],
                                rounded: Mapping[str, QuantizedMatrix]) -> None:
    """Hold what a manifest says of each quantized weight against the checkpoint.

    Args:
        checkpoint: that was exported. manifest: of the bundle.
        parameters: of its model, by every name that they have: a tied head has two, of which a checkpoint stores one.
        rounded: the matrices that the export made, quantized again (`requantized`).

    Raises:
        InvalidBundle: the stored format, bits, block, bytes or method cannot be those of the weight, or it is not
            lossless as stated; names the weight.
    """
    quantization = manifest.quantization
    if quantization is None:
        return
    held, _, left = parameters_of(checkpoint, set(parameters))
    held, left = _under_each_name(held, parameters), _under_each_name(left, parameters)
    for weight in quantization.weights:
        matrix = rounded.get(weight.name, held.get(weight.name))
        form = None if matrix is None or weight.operator == PLAIN else form_of(matrix, get_target(manifest.target))
        wrong = (_method(weight, quantization.method) or _stored(weight, checkpoint, held, left)
                 or _lossless(weight, manifest, held, left, form)
                 or (_size(weight, manifest.dtype, parameters[weight.name].numel()) if weight.name in parameters
                     else ""))
        if not wrong and matrix is not None and isinstance(form, Form):
            wrong = _packed(weight, matrix, form)
        if wrong:
            raise InvalidBundle(f"the manifest is wrong about {weight.name}: it states {wrong}", checkpoint.source,
                                "validate against the checkpoint that was exported, or export it again",
                                code="E-BUNDLE-QUANTIZATION")


def _under_each_name(found: Mapping[str, T], parameters: Mapping[str, torch.Tensor]) -> dict[str, T]:
    owners = {id(parameters[name]): value for name, value in found.items() if name in parameters}
    return {**found, **{name: owners[id(parameter)] for name, parameter in parameters.items()
                        if id(parameter) in owners and name not in found}}


def _method(weight: QuantizedWeight, method: str) -> str:
    """What the method of the whole does not allow; "" where it does."""
    if weight.operator == PLAIN or method not in (*KEPT, *METHODS):
        return ""
    if method in KEPT:
        return f"that the export rounded it, and the method {method}" if weight.rounded_bits else ""
    kind, bits = weight.kind, weight.rounding[0]
    if (kind, bits) in ((KINDS.get(method, "int"), METHODS[method]), *([("int", 8)] if method in EIGHT_TOO else [])):
        return ""
    return f"{kind} codes that were rounded to {bits} bits, and the method {method}"


def _stored(weight: QuantizedWeight, checkpoint: Checkpoint, held: Mapping[str, QuantizedMatrix],
            left: Mapping[str, str]) -> str:
    plain = checkpoint.tensors.get(weight.name)
    if weight.name in held:
        known = {held[weight.name].label}
    elif weight.name in left:
        known = {left[weight.name]}
    elif plain is not None and checkpoint.adapter is None:
        known = {plain.dtype}
    else:  # renamed, merged, read from a file of another kind
        known = {*FLOATS, *(each.dtype for each in checkpoint.tensors.values()),
                 *(each.label for each in checkpoint.quantized.values())}
    if weight.stored in known:
        return ""
    return f"that it is stored as {weight.stored}, expected {' or '.join(sorted(known)[:4])}"


def _lossless(weight: QuantizedWeight, manifest: Manifest, held: Mapping[str, QuantizedMatrix],
              left: Mapping[str, str], form: Form | str | None) -> str:
    if not weight.lossless:
        return ""
    matrix, dtype = held.get(weight.name), manifest.dtype
    if weight.operator != PLAIN:
        kept = matrix is not None and not weight.rounded_bits and isinstance(form, Form) and holds(matrix, form, dtype)
    elif matrix is not None:
        kept = holds_values(matrix, dtype)
    else:
        kept = dtype == "float32" if weight.name in left else holds_type(dtype, weight.stored)
    return "" if kept else "that it is lossless, and the graph cannot hold the checkpoint's values"


def _size(weight: QuantizedWeight, dtype: str, count: int) -> str:
    """count: elements."""
    if weight.operator == PLAIN:
        exact = count * itemsize(dtype)
        return "" if weight.bytes == exact else f"{weight.bytes} bytes, expected {exact}"
    least, most = count * weight.bits // 8, MOST * count
    return "" if least <= weight.bytes <= most else f"{weight.bytes} bytes, expected {least} to {most}"


def _packed(weight: QuantizedWeight, matrix: QuantizedMatrix, form: Form) -> str:
    """What is not as the target's operator holds the matrix. Experts of one stack, and a matrix that is looked up too,
    have parts of their own beside it."""
    if weight.experts:
        found, wanted = weight.bits, form.bits
        return "" if found == wanted else f"codes of {found} bits, expected {wanted}"
    if (form.bits, form.block) != (weight.bits, weight.block):
        return (f"codes of {weight.bits} bits in blocks of {weight.block}, expected {form.bits} bits in blocks of "
                f"{form.block}")
    if weight.operator != form.operator:
        return ""
    packer = Packer(matrix, form)
    parts = ("codes", *packer.small_parts(), *(("scale",) if form.per == "tensor" else ()),
             *(("global",) if form.scales == E4M3 else ()))
    exact = sum(packer.nbytes(part) for part in parts)
    return "" if weight.bytes == exact else f"{weight.bytes} bytes, expected {exact}"
