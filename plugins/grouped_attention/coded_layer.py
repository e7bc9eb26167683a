"""A plugin layer of version 3: one of version 1 whose cache holds codes (version 2 of the op)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gqa_plugins.grouped_attention.launch import Layer

from gqa_export.attention_op import CACHE_CODES, CODES_PLUGIN_VERSION
from gqa_export.errors import InvalidBundle

NAMES = {number: name for name, number in CACHE_CODES.items()}


@dataclass(frozen=True)
class CodedLayer(Layer):
    """The creation fields of one plugin layer of version 3."""

    version: ClassVar[str] = CODES_PLUGIN_VERSION
    cache_codes: int
    key_scale: float
    value_scale: float

    @classmethod
    def from_fields(cls, values: Mapping[str, Any], where: str = "plugin fields") -> CodedLayer:
        """From name -> number. Raises GqaExportError for a field that is missing, unknown or out of range."""
        layer = super().from_fields(values, where)
        wrong = [f"{name} is {scale}, expected a positive number" for name, scale in
                 (("key_scale", layer.key_scale), ("value_scale", layer.value_scale))
                 if not (math.isfinite(scale) and scale > 0)]
        if layer.cache_codes not in NAMES:
            wrong.insert(0, f"cache_codes is {layer.cache_codes}, expected one of {', '.join(map(str, NAMES))}")
        if wrong:
            raise InvalidBundle("; ".join(wrong), where, "export the bundle again: `gqa-export onnx --target "
                                "trt-plugin --kv-cache int8`", code="E-ENGINE-LAYER-VALUES")
        return layer

    @property
    def cache(self) -> str:
        """Type of the codes in its cache."""
        return NAMES[self.cache_codes]

    @property
    def scales(self) -> tuple[float, float]:
        """What a code of a key and one of a value is multiplied by."""
        return self.key_scale, self.value_scale
