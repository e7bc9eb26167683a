"""A plugin layer of version 2: one of version 1 with the attributes of `gqa::LongGroupedQueryAttention`.

`method` 0 is exact attention. Dimensions as in `gqa_export.long_attention_op`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gqa_plugins.grouped_attention.fields import LONG_VERSION
from gqa_plugins.grouped_attention.launch import Layer

from gqa_export.errors import InvalidBundle
from gqa_export.long_attention_op import METHODS, OWN_ATTRIBUTES, LongSetting

NAMES = {number: name for name, number in METHODS.items()}


@dataclass(frozen=True)
class LongLayer(Layer):
    """The creation fields of one plugin layer of version 2."""

    version: ClassVar[str] = LONG_VERSION
    method: int
    leaf: int
    heavy_keys: int
    samples: int
    anchors: int
    tile: int
    block: int
    score_rows: int
    exact_steps: int

    @classmethod
    def from_fields(cls, values: Mapping[str, Any], where: str = "plugin fields") -> LongLayer:
        """From name -> number. Raises GqaExportError for a field that is missing, unknown or out of range."""
        layer = super().from_fields(values, where)
        wrong = []
        if layer.method and layer.method not in NAMES:
            wrong = [f"method is {layer.method}, expected 0 or one of {', '.join(map(str, NAMES))}"]
        elif layer.long is not None:
            wrong = layer.long.problems()
            if layer.window:
                wrong.append("a layer with a window is not approximated")
        if wrong:
            raise InvalidBundle("; ".join(wrong), where, "export the bundle again: `gqa-export onnx --target "
                                "trt-plugin --long-attention`", code="E-ENGINE-LAYER-VALUES")
        return layer

    @property
    def long(self) -> LongSetting | None:
        """How long prompts are approximated; None where they are not."""
        if not self.method:
            return None
        own = {name: getattr(self, name) for name in OWN_ATTRIBUTES}
        return LongSetting(**{**own, "method": NAMES[self.method]})
