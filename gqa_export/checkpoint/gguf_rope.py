"""The rotary part of a GGUF file: keys and tensors -> transformers' `rope_parameters`.

Source: `load_hparams` and `get_rope_factors` of llama.cpp's `src/llama-model.cpp`, `ggml_rope_ext`; transformers'
`modeling_rope_utils`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import InvalidCheckpoint, UnsupportedModel
from .gguf_facts import FIX_ORIGINAL, GgufFacts
from .gguf_values import read_values

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (FREQUENCIES, LONG, SHORT)
KINDS = ("none", "linear", "yarn", "longrope")
PUBLISHED = (8192.0, 1.0, 4.0)
"""length, low and high factor of the published Llama 3 models"""


def rope_parameters(facts: GgufFacts) -> dict[str, Any]:
    """transformers' `rope_parameters` (of Gemma 3 for each kind of layer).

    Raises:
        UnsupportedModel: the file asks for a combination that transformers does not have.
        InvalidCheckpoint: a value or a tensor is senseless.
    """
    whole = {"rope_theta": facts.real("rope.freq_base", 10000.0), **_scaling(facts)}
    if facts.family.partial:
        whole["partial_rotary_factor"] = _fraction(facts.rotated, facts.head_size)
    if not facts.family.local_rope:
        return whole
    local = {"rope_theta": facts.real("rope.freq_base_swa", 10000.0), "rope_type": "default"}
    return {"full_attention": whole, "sliding_attention": local}


def _fraction(part: int, whole: int) -> float:
    """A number that gives `part` when it is multiplied by `whole` and rounded down."""
    return part / whole if int(whole * (part / whole)) == part else (part + 0.5) / whole


def _scaling(facts: GgufFacts) -> dict[str, Any]:
    kind = facts.header.about_model("rope.scaling.type")
    if kind is not None and kind not in KINDS:
        raise UnsupportedModel(f"{facts.full('rope.scaling.type')} is {kind!r}; known are {', '.join(KINDS)}",
                               facts.where, FIX_ORIGINAL, code="E-CKPT-GGUF-ROPE")
    factor = facts.real("rope.scaling.factor", facts.real("rope.scale_linear", 0.0)) or 1.0
    original = facts.integer("rope.scaling.original_context_length", facts.integer("context_length"))
    attention = facts.real("rope.scaling.attn_factor", 1.0)
    stored = [name for name in ROPE_TENSORS if name in facts.header.tensors]
    if stored and not facts.family.rope_tensors:
        raise _not_both(facts, f"tensor {stored[0]!r}", f"the architecture {facts.header.architecture}")
    tables = {name: _table(facts, name) for name in stored}
    if kind == "yarn":
        if facts.family.longrope_alone:
            raise _not_both(facts, f"{facts.full('rope.scaling.type')} = 'yarn'",
                            f"the architecture {facts.header.architecture}")
        if not facts.has("rope.scaling.factor"):
            raise facts.lacking([facts.full("rope.scaling.factor")])
        if tables:
            raise _not_both(facts, f"tensor {min(tables)!r}", "YaRN")
        own = facts.real("rope.scaling.yarn_attn_factor", 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0)
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
                "beta_fast": facts.real("rope.scaling.yarn_beta_fast", 32.0),
                "beta_slow": facts.real("rope.scaling.yarn_beta_slow", 1.0), "attention_factor": own * attention}
    named = [facts.full(f"rope.scaling.{name}") for name in ("yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")
             if facts.has(f"rope.scaling.{name}")]
    if named:
        raise _not_both(facts, named[0], f"{kind or 'no'} scaling")
    factor = 1.0 if kind == "none" else factor
    if LONG in tables or SHORT in tables or kind == "longrope":
        return _longrope(facts, tables, factor, original)
    if FREQUENCIES in tables and factor == attention == 1.0 and (llama3 := _llama3(facts, tables[FREQUENCIES])):
        return llama3
    if FREQUENCIES in tables or attention != 1.0 or (facts.family.longrope_alone and factor != 1.0):
        # LongRoPE with one table twice means any divisors
        divisors = (tables.get(FREQUENCIES, np.ones(facts.rotated // 2)) * factor).tolist()
        return {"rope_type": "longrope", "short_factor": divisors, "long_factor": divisors, "factor": 1.0,
                "attention_factor": attention, "original_max_position_embeddings": facts.integer("context_length")}
    return {"rope_type": "default"} if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _longrope(facts: GgufFacts, tables: dict[str, Any], factor: float, original: int) -> dict[str, Any]:
    absent = [name for name in (LONG, SHORT) if name not in tables]
    if absent:
        raise InvalidCheckpoint(f"the GGUF file scales its rotary frequencies by LongRoPE and does not have the tensor "
                                f"{absent[0]!r}", facts.where, "download or convert the file again",
                                code="E-CKPT-TENSORS-MISSING")
    if FREQUENCIES in tables:
        raise _not_both(facts, f"tensor {FREQUENCIES!r}", "LongRoPE")
    if not facts.has("rope.scaling.attn_factor"):
        raise facts.lacking([facts.full("rope.scaling.attn_factor")])
    return {"rope_type": "longrope", "short_factor": (tables[SHORT] * factor).tolist(),
            "long_factor": (tables[LONG] * factor).tolist(), "original_max_position_embeddings": original,
            "factor": max(facts.integer("context_length") / original, 1.0),
            "attention_factor": facts.real("rope.scaling.attn_factor", 1.0)}


def _table(facts: GgufFacts, name: str) -> Any:
    """The divisors of the rotary frequencies, as float64."""
    values = read_values(facts.header, name).astype(np.float64).reshape(-1)
    if values.size != facts.rotated // 2 or not np.isfinite(values).all() or (values <= 0).any():
        raise InvalidCheckpoint(f"tensor {name!r} does not hold {facts.rotated // 2} positive numbers, one for each "
                                "rotated pair", facts.where, "download or convert the file again",
                                code="E-CKPT-GGUF-VALUE")
    return values


def _llama3(facts: GgufFacts, divisors: Any) -> dict[str, Any] | None:
    """The parameters of Llama 3's rule that gives these divisors, None if none does. The rule has one parameter too
    many (length, low and high factor may grow together): the published values are tried first, then a low factor of 1.
    """
    base = facts.real("rope.freq_base", 10000.0)
    waves = 2 * math.pi * base ** (np.arange(0, facts.rotated, 2) / facts.rotated)
    factor = float(divisors.max())
    if factor <= 1.0:
        return None
    tried = [PUBLISHED]
    smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    between = (smooth > 1e-3) & (smooth < 1 - 1e-3)
    if between.sum() >= 2:
        slope, offset = np.polyfit(1 / waves[between], smooth[between], 1)
        if offset < 0 < slope:
            length, high = float(-slope / offset), float(1 - 1 / offset)
            tried += [(float(round(length)), 1.0, round(high, 3)), (length, 1.0, high)]
    for length, low, high in tried:
        if high <= low:
            continue
        ratio = np.clip((length / waves - low) / (high - low), 0.0, 1.0)
        if np.allclose(1 / ((1 - ratio) / factor + ratio), divisors, rtol=2e-6, atol=0.0):
            return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                    "original_max_position_embeddings": int(length) if length == int(length) else length}
    return None


def _not_both(facts: GgufFacts, one: str, other: str) -> UnsupportedModel:
    return UnsupportedModel(f"the GGUF file has {one}, which transformers does not have together with {other}",
                            facts.where, FIX_ORIGINAL, code="E-CKPT-GGUF-ROPE")
