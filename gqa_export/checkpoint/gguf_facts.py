"""What a GGUF file says of its model: values of its metadata with their types checked, and sizes that follow from them.

Defaults are llama.cpp's (`load_hparams` in `src/llama-model.cpp`): a file that leaves a key out means them.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

from ..errors import InvalidCheckpoint, UnsupportedModel
from .gguf_families import FAMILIES, QKV, Family
from .gguf_header import GgufHeader

FIX_ORIGINAL = "give the original Hugging Face checkpoint"
SIZES = ("block_count", "embedding_length", "context_length", "attention.head_count")


class GgufFacts:
    """A GGUF header, read as one of `FAMILIES`."""

    def __init__(self, header: GgufHeader) -> None:
        """Raises:
            InvalidCheckpoint: the file lacks hyperparameters, or holds senseless ones.
            UnsupportedModel: its architecture is not one of `FAMILIES`, or it is not a model.
        """
        self.header = header
        self.where = str(header.files[0]) if header.files else ""
        kind = header.metadata.get("general.type", "model")
        if kind != "model":
            raise UnsupportedModel(f"the GGUF file is of the type {kind!r}, not a model", self.where,
                                   "give the file of the model itself", code="E-CKPT-GGUF-TYPE")
        if not header.architecture:
            raise self.lacking(["general.architecture"])
        if header.architecture not in FAMILIES:
            raise UnsupportedModel(f"GGUF files of the architecture {header.architecture!r} are not read; those of "
                                   f"{', '.join(FAMILIES)} are", self.where, FIX_ORIGINAL,
                                   code="E-CKPT-GGUF-ARCHITECTURE")
        self.family: Family = FAMILIES[header.architecture]
        width = ("expert_count", "expert_used_count") if self.family.experts else ("feed_forward_length",)
        needed = (*SIZES, *width, self.family.epsilon[0])
        absent = [self.full(suffix) for suffix in needed if header.about_model(suffix) is None]
        if absent:
            raise self.lacking(absent)
        if "token_embd.weight" not in header.tensors:
            raise InvalidCheckpoint("the GGUF file does not have the tensor 'token_embd.weight'", self.where,
                                    "download or copy it again", code="E-CKPT-TENSORS-MISSING")

    def full(self, suffix: str) -> str:
        """The whole key of `suffix`."""
        return f"{self.header.architecture}.{suffix}"

    def has(self, suffix: str) -> bool:
        """Whether the file has the key."""
        return self.full(suffix) in self.header.metadata

    def integer(self, suffix: str, default: int = 0, least: int = 1) -> int:
        """A whole number. One value per layer will do if all are equal."""
        value = self.header.about_model(suffix)
        if value is None:
            return default
        if isinstance(value, list) and value and len(value) >= self.layers and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list):
            raise UnsupportedModel(f"{self.full(suffix)} differs from layer to layer", self.where, FIX_ORIGINAL,
                                   code="E-CKPT-GGUF-LAYERS")
        if type(value) is not int or not least <= value < 1 << 31:
            raise self.senseless(suffix, value, f"a whole number from {least} to {(1 << 31) - 1}")
        return value

    def real(self, suffix: str, default: float) -> float:
        """A finite number that is not negative."""
        value = self.header.about_model(suffix)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise self.senseless(suffix, value, "a finite number that is not negative")
        return float(value)

    @cached_property
    def layers(self) -> int:
        """Decoder layers."""
        value = self.header.about_model("block_count")
        if type(value) is not int or not 1 <= value < 1 << 16:
            raise self.senseless("block_count", value, "a number of layers")
        return value

    @cached_property
    def hidden(self) -> int:
        """Size of the residual stream."""
        return self.integer("embedding_length")

    @cached_property
    def heads(self) -> int:
        """Query heads."""
        return self.integer("attention.head_count")

    @cached_property
    def kv_heads(self) -> int:
        """Key and value heads; a file without them means one for each query head."""
        kv_heads = self.integer("attention.head_count_kv", self.heads)
        if self.heads % kv_heads:
            raise self.senseless("attention.head_count_kv", kv_heads, f"a divisor of {self.heads} query heads")
        return kv_heads

    @cached_property
    def head_size(self) -> int:
        """Size of a head of queries, keys and values."""
        return self.integer("attention.key_length", self.hidden // self.heads)

    @cached_property
    def rotated(self) -> int:
        """Values of a head that are rotated."""
        rotated = self.integer("rope.dimension_count", self.head_size)
        if rotated % 2 or rotated > self.head_size:
            raise self.senseless("rope.dimension_count", rotated, f"an even number up to the head size "
                                                                  f"{self.head_size}")
        return rotated

    @cached_property
    def vocabulary(self) -> int:
        """Rows of the embedding, which is what the logits have; the list of tokens may be shorter."""
        return self.header.tensors["token_embd.weight"][1][0]

    @cached_property
    def split_rows(self) -> tuple[int, int, int]:
        """Rows of queries, keys and values where they are stored in one matrix."""
        return self.heads * self.head_size, self.kv_heads * self.head_size, self.kv_heads * self.head_size

    def layer_has(self, *stems: str, suffix: str) -> bool:
        """Whether some layer stores one of these tensors; queries, keys and values may be stored in one."""
        wanted = {f"{stem}.{suffix}" for stem in (*stems, *(("attn_qkv",) if set(stems) & set(QKV) else ()))}
        return any(name.split(".", 2)[2] in wanted for name in self.header.tensors if name.count(".") >= 3)

    def lacking(self, keys: list[str]) -> InvalidCheckpoint:
        """The refusal of a file without these keys."""
        return InvalidCheckpoint(f"the GGUF file does not say {', '.join(keys)}", self.where,
                                 "give the file that holds the model's metadata (of a model in parts, with all parts "
                                 "beside it), or the original checkpoint", code="E-CKPT-GGUF-LACKS")

    def senseless(self, suffix: str, value: Any, expected: str) -> InvalidCheckpoint:
        """The refusal of a value."""
        return InvalidCheckpoint(f"{self.full(suffix)} is {value!r}, expected {expected}", self.where,
                                 "download or convert the file again", code="E-CKPT-GGUF-VALUE")
