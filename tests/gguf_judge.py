"""A decoder that reads a GGUF file by itself and computes what llama.cpp computes, in NumPy with float64.

It shares nothing with the package: the file is read with the `gguf` package, sizes come from keys, rows stay in the
order in which they are stored (neighbours are rotated where llama.cpp rotates neighbours), there is no cache.
Source: https://github.com/ggml-org/llama.cpp (`src/llama-model.cpp`, `src/models/*.cpp`, `rope_yarn` in ggml). Where
llama.cpp drops what a file says and transformers' model of the same origin has it, the file counts: the attention
window of Phi 3 and the factors of YaRN.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NEIGHBOURS = ("llama",)
"""architectures whose heads are rotated in neighbouring pairs; the others in halves"""


class Judge:
    """The model in a GGUF file. half_gelu: GELU as llama.cpp looks it up on a CPU, in a table of float16."""

    def __init__(self, path: Path, *, half_gelu: bool = False) -> None:
        self.gelu = (lambda values: half(gelu(half(values)))) if half_gelu else gelu
        reader = gguf.GGUFReader(path)
        self.keys: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.arch = self.keys["general.architecture"]
        self.tensors = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
                        for tensor in reader.tensors}
        self.layers, self.hidden = self.key("block_count"), self.key("embedding_length")
        self.heads = self.key("attention.head_count")
        self.kv_heads = self.key("attention.head_count_kv", self.heads)
        self.head = self.key("attention.key_length", self.hidden // self.heads)
        self.rotated = self.key("rope.dimension_count", self.head)
        self.window = self.key("attention.sliding_window", 4096 if self.arch == "gemma2" else 0)
        self.scale = self.head ** -0.5
        if (self.arch, self.layers) in (("gemma2", 46), ("gemma3", 62)):
            self.scale = (self.hidden // self.heads) ** -0.5

    def key(self, name: str, default: Any = None) -> Any:
        """`<architecture>.name`."""
        value = self.keys.get(f"{self.arch}.{name}", default)
        same = isinstance(value, list) and len(set(value)) == 1 and "pattern" not in name
        return value[0] if same else value

    def logits(self, ids: list[int], total: int | None = None) -> np.ndarray:
        """Logits after each of the ids, [length, vocabulary]. total: tokens that the caller has room for, which
        decides between LongRoPE's tables (the length where nothing is said)."""
        table = self.tensors["token_embd.weight"]
        state = table[ids]
        if self.arch.startswith("gemma"):
            state = state * math.sqrt(self.hidden)
        for layer in range(self.layers):
            state = self.block(state, layer, total or len(ids))
        found = self.norm(state, "output_norm") @ self.tensors.get("output.weight", table).T
        cap = self.key("final_logit_softcapping", 30.0 if self.arch == "gemma2" else 0.0)
        return cap * np.tanh(found / cap) if cap else found

    def block(self, state: np.ndarray, layer: int, total: int) -> np.ndarray:
        """One layer."""
        normed = self.norm(state, f"blk.{layer}.attn_norm")
        attended = self.attention(normed, layer, total)
        if f"blk.{layer}.post_attention_norm.weight" in self.tensors:
            attended = self.norm(attended, f"blk.{layer}.post_attention_norm")
        between = state + attended
        parallel = f"blk.{layer}.ffn_norm.weight" not in self.tensors
        fed = self.feed(normed if parallel else self.norm(between, f"blk.{layer}.ffn_norm"), layer)
        if f"blk.{layer}.post_ffw_norm.weight" in self.tensors:
            fed = self.norm(fed, f"blk.{layer}.post_ffw_norm")
        return between + fed

    def norm(self, values: np.ndarray, name: str) -> np.ndarray:
        """RMS norm, or the one with mean and bias, as the keys say."""
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias", 0.0)
        if (epsilon := self.key("attention.layer_norm_epsilon")) is not None:
            values = values - values.mean(-1, keepdims=True)
        else:
            epsilon = self.key("attention.layer_norm_rms_epsilon")
        return values / np.sqrt((values ** 2).mean(-1, keepdims=True) + epsilon) * weight + bias

    def linear(self, values: np.ndarray, name: str) -> np.ndarray:
        """Matrix and, where the file has one, bias."""
        return values @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0.0)

    def attention(self, values: np.ndarray, layer: int, total: int) -> np.ndarray:
        """Grouped-query attention of a layer, its output matrix included."""
        stem, length = f"blk.{layer}", len(values)
        sizes = [self.heads * self.head, self.kv_heads * self.head, self.kv_heads * self.head]
        if f"{stem}.attn_qkv.weight" in self.tensors:
            parts = np.split(self.linear(values, f"{stem}.attn_qkv"), np.cumsum(sizes)[:2], -1)
        else:
            parts = [self.linear(values, f"{stem}.attn_{name}") for name in "qkv"]
        q, k, v = (part.reshape(length, -1, self.head) for part in parts)
        if f"{stem}.attn_q_norm.weight" in self.tensors:
            q, k = self.norm(q, f"{stem}.attn_q_norm"), self.norm(k, f"{stem}.attn_k_norm")
        local = self.local(layer)
        q, k = self.rotate(q, local, total), self.rotate(k, local, total)
        group = self.heads // self.kv_heads
        scores = np.einsum("qhd,khd->hqk", q, np.repeat(k, group, 1)) * self.scale
        if self.arch == "gemma2":
            cap = self.key("attn_logit_softcapping", 50.0)
            scores = cap * np.tanh(scores / cap)
        distance = np.arange(length)[:, None] - np.arange(length)[None, :]
        seen = (distance >= 0) & ((distance < self.window) if local and self.window else True)
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return self.linear(np.einsum("hqk,khd->qhd", weights, np.repeat(v, group, 1)).reshape(length, -1),
                           f"{stem}.attn_output")

    def local(self, layer: int) -> bool:
        """Whether a layer attends within the window."""
        if self.arch not in ("gemma2", "gemma3"):
            return bool(self.window)
        pattern = self.key("attention.sliding_window_pattern", 2 if self.arch == "gemma2" else 6)
        if isinstance(pattern, list):
            return bool(pattern[layer])
        return bool(self.window) and (pattern == 0 or layer % pattern < pattern - 1)

    def rotate(self, values: np.ndarray, local: bool, total: int) -> np.ndarray:
        """Rotary embedding of [length, heads, head size]."""
        base, factor = self.key("rope.freq_base", 10000.0), self.key("rope.scaling.factor")
        factor = self.key("rope.scale_linear", 0.0) if factor is None else factor
        kind, original = self.key("rope.scaling.type", "linear"), self.key("rope.scaling.original_context_length",
                                                                          self.key("context_length"))
        divide = 1.0 if kind == "none" or not factor else factor
        if self.arch == "gemma3" and local:
            base, divide = self.key("rope.freq_base_swa", 10000.0), 1.0
        pairs = self.rotated // 2
        own = self.tensors.get("rope_freqs.weight")
        if own is None:
            own = self.tensors.get("rope_factors_long.weight" if total > original else "rope_factors_short.weight")
        frequencies = base ** (-np.arange(pairs) / pairs) / (np.ones(pairs) if own is None else own)
        size = self.key("rope.scaling.attn_factor", 1.0)
        if kind == "yarn":
            fast, slow = (self.key(f"rope.scaling.yarn_beta_{name}", default) for name, default in
                          (("fast", 32.0), ("slow", 1.0)))
            low, high = (self.rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))
                         for turns in (fast, slow))
            low, high = max(0, math.floor(low)), min(self.rotated - 1, math.ceil(high))
            kept = 1 - np.clip((np.arange(pairs) - low) / max(0.001, high - low), 0, 1)
            frequencies = frequencies / divide * (1 - kept) + frequencies * kept
            size *= self.key("rope.scaling.yarn_attn_factor", 1 + 0.1 * math.log(factor))
        else:
            frequencies = frequencies / divide
        angles = np.arange(len(values))[:, None, None] * frequencies
        cos, sin = np.cos(angles) * size, np.sin(angles) * size
        turned = values.copy()
        if self.arch in NEIGHBOURS:
            first, second = slice(0, self.rotated, 2), slice(1, self.rotated, 2)
        else:
            first, second = slice(0, pairs), slice(pairs, self.rotated)
        turned[..., first] = values[..., first] * cos - values[..., second] * sin
        turned[..., second] = values[..., first] * sin + values[..., second] * cos
        return turned

    def feed(self, values: np.ndarray, layer: int) -> np.ndarray:
        """The feed-forward part, or a mixture of experts."""
        stem = f"blk.{layer}"
        if f"{stem}.ffn_gate_inp.weight" in self.tensors:
            return self.experts(values, stem)
        up = self.linear(values, f"{stem}.ffn_up")
        if self.arch == "phi3":
            gate, up = np.split(up, 2, -1)
            return self.linear(silu(gate) * up, f"{stem}.ffn_down")
        if self.arch == "nemotron":
            return self.linear(np.maximum(up, 0) ** 2, f"{stem}.ffn_down")
        if self.arch == "starcoder2":
            return self.linear(self.gelu(up), f"{stem}.ffn_down")
        act = self.gelu if self.arch.startswith("gemma") else silu
        return self.linear(act(self.linear(values, f"{stem}.ffn_gate")) * up, f"{stem}.ffn_down")

    def experts(self, values: np.ndarray, stem: str) -> np.ndarray:
        """The chosen experts of each token, and the shared one."""
        scores = self.linear(values, f"{stem}.ffn_gate_inp")
        odds = np.exp(scores - scores.max(-1, keepdims=True))
        odds /= odds.sum(-1, keepdims=True)
        gate, up, down = (self.tensors[f"{stem}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
        found = np.zeros_like(values)
        for row, value in enumerate(values):
            chosen = np.argsort(-odds[row])[: self.key("expert_used_count")]
            shares = odds[row][chosen]
            if self.arch == "qwen3moe":
                shares = shares / shares.sum()
            for share, expert in zip(shares, chosen, strict=True):
                found[row] += share * down[expert] @ (silu(gate[expert] @ value) * (up[expert] @ value))
        if f"{stem}.ffn_gate_shexp.weight" in self.tensors:
            inner = silu(self.linear(values, f"{stem}.ffn_gate_shexp")) * self.linear(values, f"{stem}.ffn_up_shexp")
            share = 1 / (1 + np.exp(-(values @ self.tensors[f"{stem}.ffn_gate_inp_shexp.weight"])))
            found = found + share[:, None] * self.linear(inner, f"{stem}.ffn_down_shexp")
        return found


def silu(values: np.ndarray) -> np.ndarray:
    """x * sigmoid(x)."""
    return values / (1 + np.exp(-values))


def half(values: np.ndarray) -> np.ndarray:
    """Rounded to float16."""
    return values.astype(np.float16).astype(np.float64)


def gelu(values: np.ndarray) -> np.ndarray:
    """GELU by tanh, as ggml has it."""
    return 0.5 * values * (1 + np.tanh(math.sqrt(2 / math.pi) * (values + 0.044715 * values ** 3)))
