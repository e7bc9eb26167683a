"""The reference of the state ops in plain PyTorch, token by token, any type up to fp64.

Written for clarity, not speed. Dimensions as in `gqa_export.state_ops`. Sources: ONNX LinearAttention-27 for the four
rules; Gated DeltaNet is Yang et al., 2024 (arXiv:2412.06464), Kimi delta attention arXiv:2510.26692, and Mamba-2 the
gated rule (Dao and Gu, 2024, arXiv:2405.21060) with query = C, key = B, value = dt * x and decay = dt * A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import GqaExportError
from ...state_ops import ACTIVATIONS, RULES, is_delta


def linear_attention(query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, beta: Tensor | None,
                     state: Tensor, new_lengths: Tensor, rule: int, scale: float) -> tuple[Tensor, Tensor]:
    """`gqa::LinearAttention`; see `state_ops` for shapes.

    Returns:
        The output [B, S, Hv, Dv] in the type of `query`, and the new state [B, Hv, Dk, Dv]; nothing is mutated.

    Raises:
        GqaExportError: new_lengths is not in 0 .. S.
    """
    wide, (batch, steps, heads, size) = state.dtype, value.shape
    real_BS = _real(new_lengths, steps)
    query_BSHD, key_BSHD = (x.to(wide).repeat_interleave(heads // x.shape[2], dim=2) for x in (query, key))
    value_BSHE = value.to(wide)
    state_BHDE, rows = state.clone(), []
    for step in range(steps):
        key_BHD, target_BHE, moved_BHDE = key_BSHD[:, step], value_BSHE[:, step], state_BHDE
        if decay is not None:
            moved_BHDE = moved_BHDE * torch.exp(decay[:, step].to(wide))[..., None]
        if is_delta(RULES[rule]):
            target_BHE = target_BHE - torch.einsum("bhd,bhde->bhe", key_BHD, moved_BHDE)
        if beta is not None:
            target_BHE = target_BHE * beta[:, step].to(wide)[..., None]
        moved_BHDE = moved_BHDE + key_BHD[..., None] * target_BHE[..., None, :]
        state_BHDE = torch.where(real_BS[:, step, None, None, None], moved_BHDE, state_BHDE)
        rows.append(scale * torch.einsum("bhd,bhde->bhe", query_BSHD[:, step], moved_BHDE))
    output = torch.stack(rows, dim=1) if rows else value_BSHE.new_zeros(batch, 0, heads, size)
    return output.masked_fill(~real_BS[..., None, None], 0).to(query.dtype), state_BHDE


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, new_lengths: Tensor,
                activation: int) -> tuple[Tensor, Tensor]:
    """`gqa::CausalConv`; see `state_ops` for shapes.

    Returns:
        y [B, C, S] in the type of `x`, and the new state [B, C, K-1]; nothing is mutated.

    Raises:
        GqaExportError: new_lengths is not in 0 .. S.
    """
    wide, kept = state.dtype, state.shape[-1]
    real_BS = _real(new_lengths, x.shape[-1])
    inputs_BCX = torch.cat([state, x.to(wide)], dim=-1)
    windows_BCSK = inputs_BCX.unfold(-1, kept + 1, 1)
    y = (windows_BCSK * weight.to(wide)[:, None]).sum(-1)
    if bias is not None:
        y = y + bias.to(wide)[:, None]
    if ACTIVATIONS[activation] == "silu":
        y = torch.nn.functional.silu(y)
    last_BJ = new_lengths[:, None] + torch.arange(kept, device=x.device)
    new_state = inputs_BCX.gather(-1, last_BJ[:, None].expand(-1, x.shape[1], -1))
    return y.masked_fill(~real_BS[:, None], 0).to(x.dtype), new_state


def _real(new_lengths: Tensor, steps: int) -> Tensor:
    """Which positions hold a token: [B, S]."""
    if bool(((new_lengths < 0) | (new_lengths > steps)).any()):
        raise GqaExportError(f"new_lengths must be in 0 .. {steps}, found {new_lengths.tolist()}", "new_lengths",
                             "give the number of valid new tokens of each sequence", code="E-RUN-STATE-LENGTHS")
    return torch.arange(steps, device=new_lengths.device) < new_lengths[:, None]
