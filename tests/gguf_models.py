"""Tiny GGUF files of every architecture that is read, written with llama.cpp's names of tensors and its order of rows.

What a file means is told by `gguf_judge`, not by a model that it was made from: weights are drawn here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np

F32 = gguf.GGMLQuantizationType.F32
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD, WIDTH, ROWS = 2, 32, 4, 2, 8, 48, 61
SIZES = {"block_count": LAYERS, "context_length": 64, "embedding_length": HIDDEN, "feed_forward_length": WIDTH,
         "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "vocab_size": ROWS}
RMS = {"attention.layer_norm_rms_epsilon": 2.5e-4}
LAYER_NORM = {"attention.layer_norm_epsilon": 2.5e-4}
QUARTER = {"rope.dimension_count": 4, "rope.freq_base": 5000.0}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
EXPERTS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 24}
WIDE = {"attention.key_length": 16, "attention.value_length": 16}
GEMMA = {**WIDE, "attention.sliding_window": 6}


def ramp(low: float, high: float, count: int) -> np.ndarray:
    """Divisors of rotary frequencies."""
    return np.linspace(low, high, count, dtype=np.float32)


def llama3_divisors(count: int, base: float = 500.0, length: float = 48.0, high: float = 8.0,
                    factor: float = 8.0) -> np.ndarray:
    """What llama.cpp's converter writes for Llama 3's rule with a low factor of 1."""
    waves = 2 * math.pi * base ** (np.arange(count) / count)
    smooth = np.clip((length / waves - 1) / (high - 1), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


CASES: dict[str, tuple[str, dict[str, Any], dict[str, np.ndarray]]] = {
    "llama": ("llama", {**RMS, "rope.freq_base": 700.0, "rope.dimension_count": 8}, {}),
    "llama MHA": ("llama", {**RMS, "rope.freq_base": 700.0, "attention.head_count_kv": None}, {}),
    "llama biases": ("llama", {**RMS}, {"biases": np.array(["attn_q", "attn_k", "attn_v", "attn_output", "ffn_up"])}),
    "llama qkv biases": ("llama", {**RMS}, {"biases": np.array(["attn_q", "attn_k", "attn_v"])}),
    "llama joined": ("llama", {**RMS}, {"joined": np.array(1), "biases": np.array(["attn_q", "attn_k", "attn_v"])}),
    "llama linear": ("llama", {**RMS, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {}),
    "llama scale_linear": ("llama", {**RMS, "rope.scale_linear": 3.0}, {}),
    "llama none": ("llama", {**RMS, "rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
    "llama YaRN": ("llama", {**RMS, **YARN, "rope.freq_base": 300.0}, {}),
    "llama YaRN factors": ("llama", {**RMS, **YARN, "rope.freq_base": 300.0, "rope.scaling.yarn_attn_factor": 1.3,
                                     "rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0}, {}),
    "llama 3": ("llama", {**RMS, **WIDE, "rope.freq_base": 500.0, "rope.dimension_count": 16},
                {"rope_freqs.weight": llama3_divisors(8)}),
    "llama divisors": ("llama", {**RMS, "rope.freq_base": 500.0}, {"rope_freqs.weight": ramp(1.0, 3.0, 4)}),
    "llama head size": ("llama", {**RMS, **WIDE}, {}),
    "llama tied": ("llama", {**RMS, "vocab_size": None}, {"tied": np.array(1)}),
    "qwen2": ("qwen2", {**RMS, "rope.freq_base": 4000.0}, {"biases": np.array(["attn_q", "attn_k", "attn_v"])}),
    "qwen3": ("qwen3", {**RMS, **WIDE, **YARN, "rope.freq_base": 4000.0}, {}),
    "qwen2moe": ("qwen2moe", {**RMS, **EXPERTS, "expert_shared_feed_forward_length": 40},
                 {"biases": np.array(["attn_q", "attn_k", "attn_v"])}),
    "qwen3moe": ("qwen3moe", {**RMS, **EXPERTS, **WIDE}, {}),
    "phi3": ("phi3", {**RMS, **QUARTER, "attention.sliding_window": 6}, {}),
    "phi3 LongRoPE": ("phi3", {**RMS, **QUARTER, "attention.sliding_window": 0, "context_length": 64,
                               "rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": 1.19},
                      {"rope_factors_short.weight": ramp(1.05, 1.4, 2), "rope_factors_long.weight": ramp(2.0, 5.0, 2)}),
    "gemma": ("gemma", {**RMS, **WIDE}, {"tied": np.array(1)}),
    "gemma2": ("gemma2", {**RMS, **GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0,
                          "rope.freq_base": 4000.0}, {"tied": np.array(1)}),
    "gemma2 27B": ("gemma2", {**RMS, **GEMMA, "block_count": 46}, {"tied": np.array(1)}),
    "gemma3": ("gemma3", {**RMS, **GEMMA, "rope.freq_base": 90000.0, "rope.freq_base_swa": 300.0,
                          "rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "block_count": 3,
                          "attention.sliding_window_pattern": 3, "final_logit_softcapping": 2.0},
               {"tied": np.array(1)}),
    "gemma3 27B": ("gemma3", {**RMS, **GEMMA, "rope.freq_base": 90000.0, "block_count": 62}, {"tied": np.array(1)}),
    "starcoder2": ("starcoder2", {**LAYER_NORM, "rope.freq_base": 1e6},
                   {"biases": np.array(["attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"])}),
    "stablelm": ("stablelm", {**LAYER_NORM, **QUARTER, "use_parallel_residual": True},
                 {"biases": np.array(["attn_q", "attn_k", "attn_v"])}),
    "stablelm parallel": ("stablelm", {**LAYER_NORM, **QUARTER}, {"parallel": np.array(1)}),
    "nemotron": ("nemotron", {**LAYER_NORM, **QUARTER}, {}),
}  # fmt: skip


def tensors_of(architecture: str, keys: Mapping[str, Any], options: Mapping[str, Any],
               seed: int = 7) -> dict[str, np.ndarray]:
    """Random tensors of a model, in the shapes and names that llama.cpp expects of its keys."""
    random = np.random.default_rng(seed)
    head = keys.get("attention.key_length") or HIDDEN // keys["attention.head_count"]
    queries, others = keys["attention.head_count"], keys.get("attention.head_count_kv") or keys["attention.head_count"]
    width = keys["feed_forward_length"]

    def matrix(*shape: int) -> np.ndarray:
        return random.normal(0, 2.0 / math.sqrt(shape[-1]), shape).astype(np.float32)

    def vector(size: int, around: float = 1.0) -> np.ndarray:
        return (around + random.normal(0, 0.3, size)).astype(np.float32)

    def norm(name: str, size: int = HIDDEN) -> dict[str, np.ndarray]:
        biased = architecture in ("starcoder2", "stablelm", "nemotron")
        return {f"{name}.weight": vector(size), **({f"{name}.bias": vector(size, 0.0)} if biased else {})}

    found = {"token_embd.weight": matrix(ROWS, HIDDEN) * 2, **norm("output_norm")}
    if "tied" not in options:
        found["output.weight"] = matrix(ROWS, HIDDEN)
    for layer in range(keys["block_count"]):
        parts = {"attn_q": matrix(queries * head, HIDDEN), "attn_k": matrix(others * head, HIDDEN),
                 "attn_v": matrix(others * head, HIDDEN), "attn_output": matrix(HIDDEN, queries * head)}
        if "expert_count" in keys:
            many, inner = keys["expert_count"], keys["expert_feed_forward_length"]
            parts |= {"ffn_gate_inp": matrix(many, HIDDEN), "ffn_gate_exps": matrix(many, inner, HIDDEN),
                      "ffn_up_exps": matrix(many, inner, HIDDEN), "ffn_down_exps": matrix(many, HIDDEN, inner)}
            if shared := keys.get("expert_shared_feed_forward_length"):
                parts |= {"ffn_gate_shexp": matrix(shared, HIDDEN), "ffn_up_shexp": matrix(shared, HIDDEN),
                          "ffn_down_shexp": matrix(HIDDEN, shared), "ffn_gate_inp_shexp": matrix(1, HIDDEN)[0]}
        elif architecture == "phi3":
            parts |= {"ffn_up": matrix(2 * width, HIDDEN), "ffn_down": matrix(HIDDEN, width)}
        else:
            gate = {} if architecture in ("starcoder2", "nemotron") else {"ffn_gate": matrix(width, HIDDEN)}
            parts |= {**gate, "ffn_up": matrix(width, HIDDEN), "ffn_down": matrix(HIDDEN, width)}
        weights = {f"{name}.weight": value for name, value in parts.items()}
        for name in options.get("biases", ()):
            weights[f"{name}.bias"] = vector(parts[name].shape[0], 0.0)
        if architecture == "phi3" or "joined" in options:
            for suffix in ("weight", "bias"):
                rows = [weights.pop(f"attn_{part}.{suffix}") for part in "qkv" if f"attn_{part}.{suffix}" in weights]
                if rows:
                    weights[f"attn_qkv.{suffix}"] = np.concatenate(rows)
        names = ["attn_norm", *([] if "parallel" in options else ["ffn_norm"])]
        names += ["post_attention_norm", "post_ffw_norm"] if architecture in ("gemma2", "gemma3") else []
        for name in names:
            weights |= norm(name)
        if architecture in ("qwen3", "qwen3moe", "gemma3"):
            weights |= {"attn_q_norm.weight": vector(head), "attn_k_norm.weight": vector(head)}
        if "parallel" in options:
            weights |= {"attn_q_norm.weight": np.stack([vector(head) for _ in range(queries)]),
                        "attn_k_norm.weight": np.stack([vector(head) for _ in range(others)])}
        found |= {f"blk.{layer}.{name}": value for name, value in weights.items()}
    return found


def case(name: str) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """Architecture, keys without the architecture's name, and tensors of one of `CASES`."""
    architecture, own, options = CASES[name]
    keys = {key: value for key, value in {**SIZES, **own}.items() if value is not None}
    extra = {key: value for key, value in options.items() if key.endswith(".weight")}
    return architecture, keys, {**tensors_of(architecture, keys, options), **extra}


def write_case(path: Path, name: str, keys: Mapping[str, Any] = (), tensors: Mapping[str, Any] = (), *,
               drop: Iterable[str] = (), tokens: Mapping[str, Any] | None = None, vocabulary: bool = False,
               **kwargs: Any) -> Path:
    """One of `CASES` as a file, with keys and tensors more or fewer; returns its path. vocabulary: with the key
    vocab_size, which llama.cpp asks for where there are no tokens. kwargs: of `write_gguf`."""
    architecture, own, held = case(name)
    keys, held = {**own, **({"vocab_size": ROWS} if vocabulary else {}), **dict(keys)}, {**held, **dict(tensors)}
    for gone in drop:
        (keys if gone in keys else held).pop(gone)
    return write_gguf(path, architecture, keys, held, tokens or {}, **kwargs)


def write_gguf(path: Path, architecture: str, keys: Mapping[str, Any], tensors: Mapping[str, Any],
               others: Mapping[str, Any], stored: gguf.GGMLQuantizationType = F32,
               types: Mapping[str, gguf.GGMLQuantizationType] = MappingProxyType({}), **kwargs: Any) -> Path:
    """A GGUF file. keys: without the architecture's name; others: whole keys; stored: the type of matrices; types: of
    those whose names have such a part. kwargs: of `gguf.GGUFWriter`."""
    writer = gguf.GGUFWriter(path, architecture, **kwargs)
    for key, value in {**{f"{architecture}.{key}": value for key, value in keys.items()}, **others}.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, (list, tuple)):
            writer.add_array(key, list(value))
        else:
            writer.add_uint32(key, value)
    for key, value in tensors.items():
        value = np.ascontiguousarray(value)
        kind = next((each for part, each in types.items() if part in key), stored)
        if value.ndim == 1 or kind == F32:
            writer.add_tensor(key, value)
        else:
            writer.add_tensor(key, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
