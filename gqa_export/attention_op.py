"""The op `gqa::GroupedQueryAttention`, versions 1 and 2: its ordered inputs, outputs and attributes, as data.

Every place that spells the op out (the torch op and its fake, the ONNX function body, the TensorRT plugin, the
documentation) is held to these tables by `tests/test_attention_op.py`. A change of signature is a new version.

Dimension key: B batch, S new tokens (padded on the right), P length of the past axis (growing: any; static: C),
C cache capacity, H query heads, K key/value heads (H % K == 0), D head size of queries and keys, E of values,
R rotary size, T the length of the present axis (growing: P + S; static: C), M rows of the cos/sin tables.

Token t of sequence b lies at index t of the cache in both modes: new tokens are written at
past_lengths[b] .. past_lengths[b] + new_lengths[b] - 1. What lies beyond is unspecified.

A static cache may be a ring (`growing` is RING): P slots, at least `window`, and token t of a sequence in slot t mod P.
A call then brings at most P - window + 1 tokens to a sequence, so that none displaces what one of its rows sees.

Version 2 is version 1 with `CODE_ATTRIBUTES` after the others: past and present hold codes of `cache_codes` in place of
numbers. It is used where a cache holds codes; every other call is of version 1, so that graphs and engines of before
there was a version 2 mean what they meant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DOMAIN = "gqa"
OP = "GroupedQueryAttention"
VERSION = 1
CODES_VERSION = 2
"""of a call whose cache holds codes"""
CODES_PLUGIN_VERSION = "3"
"""of the TensorRT plugin whose nodes are such calls"""
CACHE_CODES = {"int8": 1, "fp8": 2}
"""name of a type of codes -> the value of `cache_codes`"""
RING = 2
"""the value of `growing` of a cache whose slots are used again"""


@dataclass(frozen=True)
class Port:
    """One tensor of the op. `type`: "T" (fp16, bf16, fp32; fp64 in the reference), "float32", "int32" or "int64"."""

    name: str
    shape: tuple[str, ...]
    type: Literal["T", "float32", "int32", "int64"] = "T"
    optional: bool = False
    meaning: str = ""


@dataclass(frozen=True)
class Attribute:
    """One attribute. All are numbers, none has a default: every call writes every attribute."""

    name: str
    type: Literal["int", "float"]
    meaning: str


INPUTS: tuple[Port, ...] = (
    Port("query", ("B", "S", "H*D"), meaning="new queries, already rotated unless cos and sin are given"),
    Port("key", ("B", "S", "K*D"), optional=True, meaning="new keys; absent together with value: nothing is written"),
    Port("value", ("B", "S", "K*E"), optional=True, meaning="new values"),
    Port("past_key", ("B", "K", "P", "D"), meaning="cached keys"),
    Port("past_value", ("B", "K", "P", "E"), meaning="cached values"),
    Port("past_lengths", ("B",), "int32", meaning="tokens already in the cache, per sequence"),
    Port("new_lengths", ("B",), "int32", meaning="valid new tokens per sequence"),
    Port("cos", ("M", "R/2"), optional=True, meaning="rotary table; only where the op itself rotates"),
    Port("sin", ("M", "R/2"), optional=True, meaning="rotary table; only where the op itself rotates"),
    Port("sinks", ("H",), optional=True, meaning="one extra logit per head in the denominator; -inf is none"),
)

OUTPUTS: tuple[Port, ...] = (
    Port("output", ("B", "S", "H*E"), meaning="rows at or past new_lengths are zero"),
    Port("present_key", ("B", "K", "T", "D"), meaning="the cache with the new keys in it"),
    Port("present_value", ("B", "K", "T", "E"), meaning="the cache with the new values in it"),
)

ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute("num_heads", "int", "H"),
    Attribute("kv_num_heads", "int", "K"),
    Attribute("scale", "float", "factor on the dot products"),
    Attribute("softcap", "float", "c * tanh(x / c) on the scaled scores; 0 is none"),
    Attribute("window", "int",
              "tokens visible including the current one; 0 is all; -N: those of its chunk of N positions"),
    Attribute("rotary_interleaved", "int", "1: rotate pairs (2i, 2i + 1); 0: rotate (i, i + R/2)"),
    Attribute("growing", "int", "1: the present axis is P + S; 0: it is C, the same memory as past; 2: the same, "
              "as a ring: token t is in slot t mod C"),
)

CODE_ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute("cache_codes", "int", "type of the cache: 1 int8, 2 fp8 (e4m3); 0: T, as in version 1"),
    Attribute("key_scale", "float", "a cached key is its code times this, one number for the layer"),
    Attribute("value_scale", "float", "a cached value is its code times this"),
)
"""of version 2, after those of version 1"""

INPUT_NAMES = tuple(port.name for port in INPUTS)
OUTPUT_NAMES = tuple(port.name for port in OUTPUTS)
ATTRIBUTE_NAMES = tuple(attribute.name for attribute in ATTRIBUTES)
CODE_ATTRIBUTE_NAMES = tuple(attribute.name for attribute in CODE_ATTRIBUTES)


def input_index(name: str) -> int:
    """Position of an input of the op, by name."""
    return INPUT_NAMES.index(name)
