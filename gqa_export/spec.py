"""What a decoder is, as far as attention and its cache are concerned: frozen facts, one row per layer.

`AttentionSpec` is filled from what each layer really passes to attention and what its mask really computes, never
from a model's name. Dimensions as in `gqa_export.attention_op`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class AttentionSpec:
    """One attention layer. `window` counts the current token, 0 is all; `softcap` 0 is none. `cached_alike`: PyTorch's
    own cache holds these keys and values too (not so where it holds latents, or another layer's), so that the two
    caches can be compared; the logits always are."""

    layer: int
    num_heads: int
    kv_num_heads: int
    head_size: int
    value_head_size: int
    scale: float
    softcap: float = 0.0
    window: int = 0
    sinks: bool = False
    cached_alike: bool = True

    def cache_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of keys and values that one token adds to this layer's cache."""
        return self.kv_num_heads * (self.head_size + self.value_head_size) * element_bytes


@dataclass(frozen=True)
class ModelSpec:
    """A whole decoder. `max_positions` is the longest sequence it was made for; `rope` its rotary type or ""."""

    model_type: str
    architecture: str
    vocabulary: int
    hidden_size: int
    max_positions: int
    rope: str
    layers: tuple[AttentionSpec, ...]

    def cache_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of keys and values that one token adds to the whole cache."""
        return sum(layer.cache_bytes_per_token(element_bytes) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelSpec:
        """The inverse of `to_dict`; raises TypeError or KeyError on data of another shape."""
        rest = {name: value for name, value in data.items() if name != "layers"}
        return cls(layers=tuple(AttentionSpec(**layer) for layer in data["layers"]), **rest)


DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""number formats of bundles: the name that options take -> the name of numpy and ml_dtypes, which is used elsewhere"""
FLOATS = {**DTYPES, "fp64": "float64"}
"""the same with the format of the reference"""
SHORT_DTYPES = {name: short for short, name in FLOATS.items()}


@dataclass(frozen=True)
class Fallback:
    """A layer that the target's best op could not hold: what was wanted, what was used, why. layer -1: the model."""

    layer: int
    wanted: str
    used: str
    reason: str
