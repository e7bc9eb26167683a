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

from ..quantized.kv_codes import FP8_MOST, MOST_TIE, TIE, encode_fp8, limits
from ..spec import KvCache, KvScales

FP8_WIDEST = 32
"""the distance between the largest codes of fp8"""
Rows = tuple[np.ndarray, np.ndarray]
"""what another session wrote for one sequence in one layer: keys [K, S, D], values [K, S, E]"""


class QuantizedLayer(DynamicLayer):
    """A layer's cache, of codes times a scale. tie: how far from the middle between two codes both are right, in parts
    of their distance (of fp8, of the largest: see `ties`). followed: what another session writes next; None: nobody is
    followed."""

    def __init__(self, scales: KvScales, kv: KvCache, tie: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._scales, self._bits, self._tie, self._fp8 = scales, kv.bits, tie, kv.codes == "fp8"
        self.followed: Rows | None = None
        self._exact: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any,
               **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """See transformers' `CacheLayerMixin.update`."""
        new, scales = (key_states, value_states), self._steps
        if self.followed is not None:
            exact = [quotients(states[0], scale, self._bits, self._fp8) for states, scale in zip(new, scales)]
            self._exact = exact[0], exact[1]
        key, value = (rounded(states[0], scale, self._bits, self._tie, other, self._fp8)[None]
                      for states, scale, other in zip(new, scales, self.followed or (None, None), strict=True))
        return super().update(key, value, *args, **kwargs)

    @property
    def _steps(self) -> tuple[float, float]:
        return self._scales.key, self._scales.value

    def own(self) -> Rows:
        """What the keys and values of the last step are by the rule, had nobody been followed; fp64."""
        assert self._exact is not None
        key, value = ((nearest(exact, self._fp8).double() * float(np.float32(scale))).numpy()
                      for exact, scale in zip(self._exact, self._steps))
        return key, value

    def apart(self, other: Rows) -> tuple[int, int]:
        """How many codes of another session are not nearest to this session's numbers of the last step, and of how
        many."""
        assert self._exact is not None
        found = [((codes_of(rows, scale, self._fp8) - exact.double()).abs()
                  > (0.5 + TIE) * units(exact, self._fp8).double())
                 for exact, rows, scale in zip(self._exact, other, self._steps)]
        return sum(int(one.sum()) for one in found), sum(one.numel() for one in found)


def rounded(states: torch.Tensor, scale: float, bits: int, tie: float, other: np.ndarray | None,
            fp8: bool = False) -> torch.Tensor:
    """Numbers [K, S, D] as the cache holds them, in their own format. other: the same of another session, whose codes
    are taken where they are right too. fp8: codes are 8-bit floats."""
    exact = quotients(states, scale, bits, fp8)
    codes = nearest(exact, fp8)
    if other is not None:
        theirs = codes_of(other, scale, fp8).to(states.dtype)
        codes = torch.where((theirs - exact).abs() <= (0.5 + ties(exact, tie, fp8)) * units(exact, fp8), theirs, codes)
    return codes * _step(states, scale)


def quotients(states: torch.Tensor, scale: float, bits: int, fp8: bool = False) -> torch.Tensor:
    """Numbers [K, S, D] in steps of the scale, clipped, not rounded."""
    return (states / _step(states, scale)).clamp(*((-FP8_MOST, FP8_MOST) if fp8 else limits(bits)))


def units(exact: torch.Tensor, fp8: bool) -> torch.Tensor:
    """The distance between the two codes around each quotient: 1; between two 8-bit floats 3 bits behind the first bit,
    and 2^-9 at least."""
    unit = torch.ones_like(exact)
    if not fp8:
        return unit
    exponent = torch.where(exact == 0, -5, torch.frexp(exact)[1])  # frexp gives 0 for zero
    return torch.ldexp(unit, exponent.clamp(min=-5) - 4)


def ties(exact: torch.Tensor, tie: float, fp8: bool) -> torch.Tensor:
    """How far from the middle between its two codes each quotient may be to become either, in parts of their distance.

    A number is a sum of others that are as large as the largest, and rounding moves it by as much. The smaller codes of
    fp8 are nearer to one another, so that this is a larger part of their distance: on a tiny model in fp32, of codes
    of 9 and 10 times the least one was as right as the other. tie: that of the largest codes."""
    unit = units(exact, fp8)
    return (FP8_WIDEST * tie / unit).clamp(TIE, MOST_TIE) if fp8 else torch.full_like(unit, tie)


def nearest(exact: torch.Tensor, fp8: bool) -> torch.Tensor:
    """The code nearest to each quotient, ties to even."""
    unit = units(exact, fp8)
    return torch.round(exact / unit) * unit


def codes_of(numbers: np.ndarray, scale: float, fp8: bool) -> torch.Tensor:
    """The codes that a cache's numbers stand for, fp64."""
    quotient = numbers.astype(np.float64) / np.float64(np.float32(scale))
    return torch.from_numpy(encode_fp8(quotient, 1.0).astype(np.float64) if fp8 else np.rint(quotient))


def _step(states: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.tensor(np.float32(scale), dtype=torch.float32).to(states.dtype)


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
