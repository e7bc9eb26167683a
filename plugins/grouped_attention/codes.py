"""A cache of codes, in PyTorch: the rule by which numbers become codes, and what a launch is told of them.

The rule is that of `gqa_export.quantized.kv_codes`, dimensions as in `gqa_export.attention_op`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gqa_plugins.grouped_attention.plan import APPEND_STEPS

CACHES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
"""type of a cache of codes -> its name in `attention_op.CACHE_CODES`"""


@dataclass(frozen=True)
class Codes:
    """What a launch over caches of codes is told.

    Attributes:
        key_scale: of every key of the layer. value_scale: of every value.
        faults: int32 [B, K, tiles of new tokens], written by `append`; None where nothing is new.
    """

    key_scale: float
    value_scale: float
    faults: torch.Tensor | None

    @classmethod
    def of(cls, query: torch.Tensor, kv_heads: int, key_scale: float, value_scale: float, has_new: bool) -> Codes:
        """For a call with these new queries [B, S, H*D]."""
        batch, steps, _ = query.shape
        faults = query.new_empty((batch, kv_heads, -(-steps // APPEND_STEPS)), dtype=torch.int32) if has_new else None
        return cls(key_scale, value_scale, faults)


def encode(numbers: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Codes of numbers: to nearest, ties to even, ends for what lies beyond. A NaN is a NaN of fp8, and code 0 of int8.

    Args:
        numbers: of any float type, in which the quotients are worked out.
        scale: the step, taken as fp32.
        dtype: of `CACHES`.
    """
    step = torch.tensor(scale, dtype=torch.float32, device=numbers.device).to(numbers.dtype)
    exact = numbers / step
    if dtype == torch.int8:
        return torch.round(exact.clamp(-128, 127)).nan_to_num(0).to(dtype)
    return nearest_fp8(exact.clamp(-448, 448)).to(dtype)


def nearest_fp8(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers of at most 448 as e4m3 has them, in their own type. Rounded once, where a conversion of fp64 would pass
    fp32 on its way."""
    exponent = torch.frexp(numbers)[1].clamp(min=-5) - 4  # of the last bit: 3 behind the first, at least 2^-9
    step = torch.ldexp(torch.ones_like(numbers), exponent)
    return torch.round(numbers / step) * step


def decode(codes: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that codes stand for, in a float type."""
    return codes.to(dtype) * torch.tensor(scale, dtype=torch.float32, device=codes.device).to(dtype)


def first_faults(new_BSKD: torch.Tensor, new_lengths_B: torch.Tensor) -> torch.Tensor:
    """int64 [B, K]: the first valid new token that holds a NaN or an infinity in a head; S where none does."""
    steps = new_BSKD.shape[1]
    at_S = torch.arange(steps, device=new_BSKD.device)
    odd_BSK = ~new_BSKD.isfinite().all(-1) & (at_S < new_lengths_B[:, None])[..., None]
    return torch.where(odd_BSK, at_S[:, None], steps).amin(1)
