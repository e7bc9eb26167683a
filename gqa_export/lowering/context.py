"""What a lowering is asked for, what its passes share, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from .. import graph_io
from ..spec import AttentionSpec, Fallback, ModelSpec
from ..targets import Target

if TYPE_CHECKING:
    import onnx

    from .rotary.verify import Rotation


@dataclass(frozen=True)
class LowerOptions:
    """What the caller asks for. capacity: tokens of a static cache, and rows of rotary tables in both modes.
    logits: "all" or "last". packed: weights are copied, so matrices may be joined (False: used as stored)."""

    target: str
    cache: str = "growing"
    capacity: int = 4096
    logits: str = "all"
    provider: str = "cpu"
    packed: bool = True


@dataclass(frozen=True)
class Lowered:
    """The model in its dialect, weights still recipes; layers that fell back; the count of each pass; remarks, one
    line each, on what is right but not as fast as it could be."""

    model: onnx.ModelProto
    fallbacks: tuple[Fallback, ...]
    counts: dict[str, int]
    remarks: tuple[str, ...] = ()


@dataclass
class Context:
    """What the passes share.

    model: the canonical ModelProto. element: the ONNX type of its logits, so of all its activations. rotations: per
    layer, the rotation that a pass moved into the attention op. remarks: one line each, on what is right but not as
    fast as it could be.
    """

    spec: ModelSpec
    target: Target
    options: LowerOptions
    model: onnx.ModelProto
    fallbacks: list[Fallback] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    rotations: dict[int, Rotation] = field(default_factory=dict)

    @cached_property
    def element(self) -> int:
        """ONNX's number of the model's float type."""
        return next(value.type.tensor_type.elem_type for value in self.model.graph.output
                    if value.name == graph_io.LOGITS)

    def layer(self, number: int) -> AttentionSpec:
        """The spec of layer `number`."""
        return next(layer for layer in self.spec.layers if layer.layer == number)

    def fall_back(self, layer: int, reason: str) -> None:
        """Record that `layer` does not become the target's attention op."""
        self.fallbacks.append(Fallback(layer, self.target.attention, self.target.fallback, reason))
