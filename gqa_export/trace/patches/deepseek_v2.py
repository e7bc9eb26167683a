"""DeepSeek-V2: rotary embedding in complex numbers, which ONNX does not have, rewritten with cosine and sine."""

from __future__ import annotations

from typing import Any

import torch

from .registry import Patch

WHY = "rotary embedding is written with complex numbers"


def angles(_original: Any, _module: Any) -> Any:
    """Cosines and sines of a rotary embedding's angles as the last dimension, in place of complex numbers."""
    @torch.no_grad()
    def forward(self: Any, x: Any, position_ids: Any) -> torch.Tensor:
        angles_BSR = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        return torch.stack([angles_BSR.cos(), angles_BSR.sin()], dim=-1) * self.attention_scaling  # [B, S, R/2, 2]

    return forward


def rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Pairs of neighbours turned by the angles whose cosines and sines are given, in fp32."""
    pairs = states.float().unflatten(-1, (-1, 2))
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return turned.flatten(3).type_as(states)


def _rotate(_original: Any, _module: Any) -> Any:
    def apply_rotary_emb(xq: Any, xk: Any, freqs_cis: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = freqs_cis[:, None, ..., 0], freqs_cis[:, None, ..., 1]
        return rotated(xq, cos, sin), rotated(xk, cos, sin)

    return apply_rotary_emb


PATCHES = (
    Patch("deepseek_v2.modeling_deepseek_v2", "DeepseekV2RotaryEmbedding.forward", angles, WHY),
    Patch("deepseek_v2.modeling_deepseek_v2", "apply_rotary_emb", _rotate, WHY),
)
