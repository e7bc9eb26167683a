"""PyTorch with a quantized cache: every key and value is rounded to a code when it enters, and attended as such.

A number near the middle between two codes may become either, and what follows differs then. So a session may follow
another: where both of two codes are right, it takes the other's. Dimensions as in `gqa_export.attention_op`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..quantized.kv_codes import FP8_MOST, TIE, encode_fp8, limits
from ..spec import KvCache, KvScales

Rows = tuple[np.ndarray, np.ndarray]
"""what another session wrote for one sequence in one layer: keys [K, S, D], values [K, S, E]"""


class QuantizedLayer(DynamicLayer):
    """A layer's cache, of codes times a scale. tie: how far from the middle between two codes both are right. followed:
    what another session writes next; None: nobody is followed."""

    def __init__(self, scales: KvScales, kv: KvCache, tie: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._scales, self._bits, self._tie, self._fp8 = scales, kv.bits, tie, kv.codes == "fp8"
        self.followed: Rows | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any,
               **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """See transformers' `CacheLayerMixin.update`."""
        new, scales = (key_states, value_states), (self._scales.key, self._scales.value)
        key, value = (rounded(states[0], scale, self._bits, self._tie, other, self._fp8)[None]
                      for states, scale, other in zip(new, scales, self.followed or (None, None), strict=True))
        return super().update(key, value, *args, **kwargs)


def rounded(states: torch.Tensor, scale: float, bits: int, tie: float, other: np.ndarray | None,
            fp8: bool = False) -> torch.Tensor:
    """Numbers [K, S, D] as the cache holds them, in their own format. other: the same of another session, whose codes
    are taken where they are right too. fp8: codes are 8-bit floats."""
    step = torch.tensor(np.float32(scale), dtype=torch.float32).to(states.dtype)
    exact = (states / step).clamp(*((-FP8_MOST, FP8_MOST) if fp8 else limits(bits)))
    # between two floats the distance is 3 bits behind the first bit, and 2^-9 at least
    unit = torch.ones_like(exact)
    if fp8:
        unit = torch.ldexp(unit, torch.frexp(exact)[1].clamp(min=-5) - 4)
    codes = torch.round(exact / unit) * unit
    if other is not None:
        quotients = other.astype(np.float64) / np.float64(np.float32(scale))
        theirs = torch.from_numpy(encode_fp8(quotients, 1.0).astype(np.float64) if fp8 else np.rint(quotients))
        theirs = theirs.to(states.dtype)
        codes = torch.where((theirs - exact).abs() <= (0.5 + tie) * unit, theirs, codes)
    return codes * step


def quantized_cache(kv: KvCache, tie: float = TIE) -> DynamicCache:
    """An empty cache for one sequence."""
    cache: Any = DynamicCache()
    cache.layers = [QuantizedLayer(scales, kv, tie) for scales in kv.scales]
    cache.layer_class_to_replicate = None
    return cache


def follow(cache: Any, keys: list[np.ndarray], values: list[np.ndarray]) -> None:
    """Let the next step of one sequence take these codes where they are right. One array [K, S, D] for each layer."""
    for layer, key, value in zip(cache.layers, keys, values, strict=True):
        layer.followed = (key, value)
