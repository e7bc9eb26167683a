"""llama.cpp's names of a model's tensors: which of them the loader uses, and what of transformers' they become."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..errors import UnsupportedModel
from .gguf_facts import FIX_ORIGINAL, GgufFacts
from .gguf_families import GLOBAL, QKV
from .gguf_rope import ROPE_TENSORS

LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
JOINED = "attn_qkv"


class Place(NamedTuple):
    """Where a tensor belongs: `layer` is None outside of layers; `stem` and `suffix` are llama.cpp's."""

    layer: int | None
    stem: str
    suffix: str


def check_tensors(facts: GgufFacts) -> None:
    """Refuse every tensor that the loader would not use.

    Raises:
        UnsupportedModel: it names the tensors.
    """
    unused = [name for name in facts.header.tensors if name not in ROPE_TENSORS and place_of(facts, name) is None]
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        raise UnsupportedModel(f"the GGUF file has tensors that transformers' {facts.family.model_type} does not use: "
                               f"{', '.join(unused[:3])}{more}", facts.where, FIX_ORIGINAL,
                               code="E-CKPT-GGUF-TENSOR")


def place_of(facts: GgufFacts, name: str) -> Place | None:
    """Where a tensor belongs, None if it does not belong to the model."""
    found = LAYER.fullmatch(name)
    if found is None:
        stem, _, suffix = name.rpartition(".")
        bias = suffix == "bias" and stem == "output_norm" and facts.family.layer_norm
        return Place(None, stem, suffix) if stem in GLOBAL and (suffix == "weight" or bias) else None
    layer, stem, suffix = int(found[1]), found[2], found[3]
    if layer >= facts.layers or str(layer) != found[1]:
        return None
    if stem == JOINED:
        split = [f"blk.{layer}.{part}.{suffix}" for part in QKV]
        if suffix == "weight" and any(part in facts.header.tensors for part in split):
            return None
        known = all(has_bias(facts, part) for part in QKV) if suffix == "bias" else True
        return Place(layer, stem, suffix) if known else None
    known = stem in facts.family.layer and (suffix == "weight" or has_bias(facts, stem))
    return Place(layer, stem, suffix) if known else None


def has_bias(facts: GgufFacts, stem: str) -> bool:
    """Whether transformers' model can have a bias beside this weight of a layer."""
    if stem in ("attn_norm", "ffn_norm"):
        return facts.family.layer_norm
    return any(stem in stems for _, stems in facts.family.biases)
