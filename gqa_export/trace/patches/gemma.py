"""Gemma 3n and 4: a quantile of the normal distribution computed in the graph, and inputs cut for `logits_to_keep`."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import torch

from .registry import Patch


def _sparse(_original: Any, _module: Any) -> Any:
    def _gaussian_topk(self: Any, inputs: Any) -> torch.Tensor:
        quantile = NormalDist().inv_cdf(float(self.activation_sparsity))  # of a constant: a constant
        mean, deviation = inputs.mean(-1, keepdim=True), inputs.std(-1, keepdim=True, unbiased=False)
        return torch.relu(inputs - (mean + deviation * quantile))

    return _gaussian_topk


def _uncut(original: Any, _module: Any) -> Any:
    def _maybe_slice_kv_shared_inputs(self: Any, *inputs: Any, **others: Any) -> Any:
        *whole, logits_to_keep = inputs[:-1] if inputs and not others.keys() & {"cache", "past_key_values"} else inputs
        if isinstance(logits_to_keep, int) and logits_to_keep == 0:  # all are kept
            return tuple(whole)
        return original(self, *inputs, **others)

    return _maybe_slice_kv_shared_inputs


CUT = "the mask is cut before the layers that share keys and values, also where nothing is left out"
PATCHES = (
    Patch("gemma3n.modeling_gemma3n", "Gemma3nTextMLP._gaussian_topk", _sparse,
          "the inverse of the error function, which ONNX does not have, is applied to a constant"),
    Patch("gemma4.modeling_gemma4", "Gemma4TextModel._maybe_slice_kv_shared_inputs", _uncut, CUT),
    Patch("gemma4_unified.modeling_gemma4_unified", "Gemma4UnifiedTextModel._maybe_slice_kv_shared_inputs", _uncut,
          CUT),
)
