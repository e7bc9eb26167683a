"""The result of a trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..spec import ModelSpec

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Traced:
    """The canonical model and how it came about.

    Attributes:
        model: weights by name only.
        spec: facts of every attention layer.
        traced_layers: how many decoder layers were recorded.
        whole_because: "" if the rest were stamped, else why every layer was traced.
        rope_regime: "short" where `longrope` has one table because of the capacity, "both" where it has two, "dynamic"
            where such a rotary was fixed, else "".
        tied: groups of names of one tensor.
        converts: transformers renames or merges tensors on load.
        capacity: tokens that it was traced for.
        slow_because: "" if the light capture recorded it, else what stopped that and let torch.export do it.
    """

    model: onnx.ModelProto
    spec: ModelSpec
    traced_layers: int
    whole_because: str
    rope_regime: str
    tied: tuple[tuple[str, ...], ...]
    converts: bool
    capacity: int
    slow_because: str = ""
