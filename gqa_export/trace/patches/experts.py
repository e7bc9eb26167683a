"""Experts that a model reaches in a loop over those that were chosen: every token multiplies by its own instead.

Such a loop looks at values while it runs, which no fixed graph can hold. Here the weights of a token's experts are
picked by index and multiplied at once, as transformers' own `batched_mm` does for the models that use its experts
interface: the same products, added up over a token's experts.
"""

from __future__ import annotations

from typing import Any

import torch

from .registry import Patch

WHY = "the experts are reached in a loop over those that were chosen, which looks at values"


def chosen(states_TX: torch.Tensor, weights_EYX: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
    """Each token times the weights of each of its experts: [T, K, Y]. states: [T, X], or [T, K, X], one a choice."""
    states_TKX = states_TX if states_TX.dim() == 3 else states_TX[:, None].expand(-1, index_TK.shape[1], -1)
    return torch.matmul(weights_EYX[index_TK], states_TKX[..., None])[..., 0]


def _dbrx(_original: Any, _module: Any) -> Any:
    def forward(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> torch.Tensor:
        shape = (-1, self.ffn_hidden_size, self.hidden_size)
        states_TX = hidden_states.reshape(-1, self.hidden_size)
        gate, up = (chosen(states_TX, weight.view(shape), top_k_index) for weight in (self.mlp.w1, self.mlp.v1))
        inner = self.mlp.activation_fn(gate) * up
        outer = chosen(inner, self.mlp.w2.view(shape).transpose(1, 2), top_k_index)
        return (outer * top_k_weights[..., None]).sum(1).view(hidden_states.shape)

    return forward


def _longcat(_original: Any, _module: Any) -> Any:
    def forward(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> torch.Tensor:
        index_TK = top_k_index.clamp(max=self.num_routed_experts - 1)
        gate, up = chosen(hidden_states, self.gate_up_proj, index_TK).chunk(2, dim=-1)
        outer = chosen(self.act_fn(gate) * up, self.down_proj, index_TK)
        idle_TK1 = (top_k_index >= self.num_routed_experts)[..., None]  # these hand a token on as it is
        outer = torch.where(idle_TK1, hidden_states[:, None], outer) * top_k_weights[..., None]
        return outer.to(hidden_states.dtype).sum(1)

    return forward


def _jetmoe_choice(router: Any, states_TX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices and gates [T, K] of the chosen experts, and all logits."""
    logits = router.layer(states_TX).float()
    top, index_TK = logits.topk(router.top_k, dim=1)
    return index_TK, torch.softmax(top, dim=1).type_as(states_TX), logits


def _jetmoe_mlp(_original: Any, _module: Any) -> Any:
    def forward(self: Any, layer_input: Any) -> torch.Tensor:
        states_TX = layer_input.reshape(-1, layer_input.shape[-1])
        index_TK, gates_TK, _ = _jetmoe_choice(self.router, states_TX)
        gate, up = chosen(states_TX, self.input_linear.weight, index_TK).chunk(2, dim=-1)
        outer = chosen(self.activation(gate) * up, self.output_linear.weight, index_TK)
        return (outer * gates_TK[..., None]).sum(1).view(layer_input.shape) + self.bias

    return forward


def _jetmoe_map(_original: Any, _module: Any) -> Any:
    def map(self: Any, layer_input: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
        states_TX = layer_input.reshape(-1, layer_input.shape[-1])
        index_TK, gates_TK, logits = _jetmoe_choice(self.router, states_TX)
        queries = chosen(states_TX, self.input_linear.weight, index_TK)
        return queries.view(*layer_input.shape[:2], self.top_k, -1), logits, (index_TK, gates_TK)

    return map


def _jetmoe_reduce(_original: Any, _module: Any) -> Any:
    def reduce(self: Any, layer_input: Any, topo_info: Any) -> torch.Tensor:
        index_TK, gates_TK = topo_info
        outer = chosen(layer_input.flatten(0, 1), self.output_linear.weight, index_TK) * gates_TK[..., None]
        return outer.sum(1).view(*layer_input.shape[:2], self.input_size) + self.bias

    return reduce


PATCHES = (
    Patch("dbrx.modeling_dbrx", "DbrxExperts.forward", _dbrx, WHY),
    Patch("jetmoe.modeling_jetmoe", "JetMoeMoE.forward", _jetmoe_mlp, WHY),
    Patch("jetmoe.modeling_jetmoe", "JetMoeMoA.map", _jetmoe_map, WHY),
    Patch("jetmoe.modeling_jetmoe", "JetMoeMoA.reduce", _jetmoe_reduce, WHY),
    Patch("longcat_flash.modeling_longcat_flash", "LongcatFlashExperts.forward", _longcat, WHY),
)
