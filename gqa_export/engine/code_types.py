"""Which codes of quantized weights and caches an engine can hold, by compute capability: refused before the build.

Tried: TensorRT for RTX 1.7 built, or refused ("HW-specific datatypes"), a product with a weight of each type, for
7.5, 8.0, 8.6, 8.9, 12.0 and 12.1. No GPU has run one. Between them, and for TensorRT, the first capability is that of
NVIDIA's documentation: FP8 since Ada, FP4 since Blackwell.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import onnx

from ..errors import GqaExportError
from .choose_library import Choice, dotted


@dataclass(frozen=True)
class CodeType:
    """A type of codes.

    Attributes:
        name: for people.
        element: ONNX's number of the type.
        least: the first compute capability that holds it, as a whole number: 89 is 8.9.
        built, refused: what TensorRT for RTX was seen to do, by capability.
    """

    name: str
    element: int
    least: int
    built: tuple[int, ...]
    refused: tuple[int, ...]


CODE_TYPES = (
    CodeType("8-bit integers", onnx.TensorProto.INT8, 75, (75, 80, 86, 89, 120, 121), ()),
    CodeType("4-bit integers", onnx.TensorProto.INT4, 80, (80, 86, 89, 120, 121), (75,)),
    CodeType("FP8 (e4m3)", onnx.TensorProto.FLOAT8E4M3FN, 89, (89, 120, 121), (75, 80, 86)),
    CodeType("FP4 (e2m1: NVFP4, MXFP4)", onnx.TensorProto.FLOAT4E2M1, 100, (120, 121), (75, 80, 86, 89)),
)
"""in the order of the first capability that holds them"""


def code_types_of(model: onnx.ModelProto) -> tuple[CodeType, ...]:
    """The types of the codes that a graph's weights are."""
    return _of_elements({tensor.data_type for tensor in model.graph.initializer})


def cache_types_of(model: onnx.ModelProto) -> tuple[CodeType, ...]:
    """The types of the codes that come into a graph and go out of it: those of its cache."""
    return _of_elements({port.type.tensor_type.elem_type for port in (*model.graph.input, *model.graph.output)})


def _of_elements(there: Collection[int]) -> tuple[CodeType, ...]:
    return tuple(each for each in CODE_TYPES if each.element in there)


def code_types_of_kinds(kinds: Collection[str]) -> tuple[CodeType, ...]:
    """The types of codes of float8 and float4 among kinds of `QuantizedMatrix`."""
    return _of_elements([element for kind, element in (
        ("e4m3", onnx.TensorProto.FLOAT8E4M3FN), ("e2m1", onnx.TensorProto.FLOAT4E2M1)) if kind in kinds])


def for_code_types(choice: Choice, types: Iterable[CodeType], where: str, *, kept: bool, named: bool,
                   cache: bool = False) -> Choice:
    """The choice without the capabilities that cannot hold the codes of a bundle.

    Args:
        choice: of the library and the capabilities.
        types: of the bundle's codes.
        where: they are, for the message.
        kept: they are the checkpoint's own.
        named: the user named the capabilities, or TensorRT builds for the GPU at hand: nothing is left out then.
        cache: they are those of the cache, not of weights.

    Raises:
        GqaExportError: a named capability, or every one, cannot hold a type.
    """
    most = max(types, key=lambda each: each.least, default=CODE_TYPES[0])
    missing = [number for number in choice.capabilities if number < most.least]
    if not missing:
        return choice
    left = tuple(number for number in choice.capabilities if number not in missing)
    what = f"the {'cache is' if cache else 'weights are'} {most.name}"
    instead = "--kv-cache int8" if cache else f"--quantize {'dequantize' if kept else 'int4'}"
    if named or not left:
        raise GqaExportError(
            f"{what}, for which GPUs of compute capability {dotted(missing)} have no instructions: "
            f"they need {dotted((most.least,))}", where,
            f"use --compute-capability {dotted((max(most.least, min(most.built)),))}, or export the checkpoint again "
            f"with {instead}", code="E-ENGINE-CODES")
    return replace(choice, capabilities=left,
                   engine_capabilities=tuple(number for number in choice.engine_capabilities if number in left),
                   notes=(*choice.notes, f"not built for {dotted(missing)}: {what}, which needs "
                          f"{dotted((most.least,))}"))
