"""The op `gqa::LongGroupedQueryAttention`, version 1: approximate attention for long prompts, as data.

It has the inputs, outputs and attributes of `gqa::GroupedQueryAttention` and, after them, its own. Every place that
spells the op out (the torch op and its fake, the ONNX function body, the documentation) is held to these tables by
`tests/test_long_attention_op.py`. A change of signature bumps `VERSION`.

The keys before a row's leaf (a span of `leaf` positions, counted from position 0) are not all read: the first `anchors`
and some `heavy_keys` are, and `samples` drawn from all of them stand, each with a weight, for the rest. Method `hyper`
is HyperAttention (Han et al. 2023, arXiv:2310.05869): heavy keys share a bucket of a sorted, locality-sensitive hash,
the prefix is split as the causal recursion splits it. Method `tiles` lets a few rows of a tile vote for blocks of keys.

Further letters: m samples, r projections of the hash, N length of what a method selects.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from . import attention_op
from .attention_op import Attribute, Port
from .spec import FAIL_FAST, MOST_LAYERS, STRICT, AttentionSpec, Count, Layer, Limits, OneOf, Size

DOMAIN = attention_op.DOMAIN
OP = "LongGroupedQueryAttention"
VERSION = 1
METHODS = {"hyper": 1, "tiles": 2}
"""name of a method -> the number that the attribute `method` has"""
STEPS = 1 << 16
"""a fraction of `fractions` counts in this many steps"""
PROJECTIONS = 7
"""bits of the hash of a key: as many as the public PyTorch code of HyperAttention takes"""

INPUTS: tuple[Port, ...] = (
    *attention_op.INPUTS,
    Port("fractions", ("K", "m"), "int64", meaning="where in its stratum each sample lies, in 1/65536 of it"),
    Port("projections", ("D", "r"), "float32", meaning="directions whose signs are the bits of a code; read by hyper"),
    Port("code_order", ("2^r",), "int64", meaning="place of a code in an order in which neighbours differ in one bit"),
)
OUTPUTS: tuple[Port, ...] = (
    *attention_op.OUTPUTS,
    Port("selection", ("B", "K", "N"), "int64",
         meaning="hyper: places of the codes of all T keys, then of the new queries, head by head; tiles: per tile the "
                 "chosen blocks, -1 where there are fewer; empty where the call was exact"),
)
ATTRIBUTES: tuple[Attribute, ...] = (
    *attention_op.ATTRIBUTES,
    Attribute("method", "int", "1 hyper, 2 tiles"),
    Attribute("leaf", "int", "positions of a leaf, within which attention is exact"),
    Attribute("heavy_keys", "int", "hyper: keys of a bucket; tiles: keys of the chosen blocks"),
    Attribute("samples", "int", "sampled keys, hyper: of each segment; tiles: of the prefix"),
    Attribute("anchors", "int", "first keys, always read; tiles rounds them up to blocks, which are among the chosen"),
    Attribute("tile", "int", "rows that share their chosen blocks; tiles only"),
    Attribute("block", "int", "keys of a block; tiles only"),
    Attribute("score_rows", "int", "rows of a tile and head that vote; tiles only"),
    Attribute("exact_steps", "int", "calls of at most this many new tokens are exact"),
)
INPUT_NAMES = tuple(port.name for port in INPUTS)
OUTPUT_NAMES = tuple(port.name for port in OUTPUTS)
ATTRIBUTE_NAMES = tuple(attribute.name for attribute in ATTRIBUTES)
OWN_ATTRIBUTES = ATTRIBUTE_NAMES[len(attention_op.ATTRIBUTES):]


@dataclass(frozen=True)
class LongSetting:
    """How attention is approximated: the op's own attributes, with the method by its name."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    method: Annotated[str, OneOf("hyper", "tiles")] = "tiles"
    leaf: Size = 1024
    heavy_keys: Size = 384
    samples: Annotated[int, Limits(ge=1, le=1 << 20)] = 128
    anchors: Count = 4
    tile: Size = 128
    block: Size = 32
    score_rows: Size = 8
    exact_steps: Count = 16

    def attributes(self) -> dict[str, int]:
        """The op's own attributes, in order."""
        return {**asdict(self), "method": METHODS[self.method]}

    def problems(self, capacity: int = 0) -> list[str]:
        """Every reason why the op does not take this setting, with a cache of `capacity` tokens; [] if it does."""
        if self.method not in METHODS:
            return [f"the method is {self.method!r}, expected one of {', '.join(METHODS)}"]
        least = {name: int(name not in ("anchors", "exact_steps")) for name in OWN_ATTRIBUTES if name != "method"}
        wrong = [f"{name} is {getattr(self, name)}, expected at least {lowest}" for name, lowest in least.items()
                 if getattr(self, name) < lowest]
        if wrong:
            return wrong
        if self.method == "hyper":
            wrong += [f"{name} is {getattr(self, name)}, expected a power of two" for name in ("leaf", "heavy_keys")
                      if getattr(self, name).bit_count() != 1]
            if capacity > self.leaf * self.heavy_keys:
                wrong.append(f"the capacity is {capacity}, and leaf {self.leaf} with heavy_keys {self.heavy_keys} "
                             f"reaches {self.leaf * self.heavy_keys} tokens: a leaf has too few rows for more buckets")
        else:
            wrong += [f"{name} {getattr(self, name)} is not a multiple of {part} {getattr(self, part)}"
                      for name, part in (("leaf", "tile"), ("leaf", "block"), ("heavy_keys", "block"))
                      if getattr(self, name) % getattr(self, part)]
            if self.score_rows > self.tile:
                wrong.append(f"score_rows is {self.score_rows}, a tile has {self.tile} rows")
            if self.anchors > self.heavy_keys:
                wrong.append(f"anchors is {self.anchors}, and they are among the {self.heavy_keys} heavy keys")
        if self.anchors > self.leaf:
            wrong.append(f"anchors is {self.anchors}, more than the {self.leaf} keys of a leaf")
        return wrong


DEFAULTS = {"tiles": LongSetting(), "hyper": LongSetting("hyper", heavy_keys=256, samples=256)}
"""what each method takes where nothing else is said; the numbers of hyper are those of the paper's experiments, with a
smaller leaf and with anchors"""


@dataclass(frozen=True)
class LongPlan:
    """What of a model is approximated.

    Attributes:
        setting: how.
        layers: numbers of the layers, in order.
        seed: of the tables.
        from_tokens: a call that makes the longest sequence longer than this is approximated, where it brings more than
            `exact_steps` tokens; shorter ones are not faster for it.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    setting: LongSetting
    layers: Annotated[tuple[Layer, ...], Limits(min_length=1, max_length=MOST_LAYERS, **FAIL_FAST.limits)]
    seed: Count = 0
    from_tokens: Size = 4096

    def pays(self, new: int, past: int) -> bool:
        """Whether a call of so many new tokens over the longest past is approximated."""
        return new > self.setting.exact_steps and past + new > self.from_tokens

    def problems(self, layers: tuple[AttentionSpec, ...], capacity: int) -> list[str]:
        """Every reason why a model's layers cannot be approximated so; [] if they can."""
        known = {layer.layer: layer for layer in layers}
        wrong = self.setting.problems(capacity)
        wrong += [f"layer {number} has no attention" for number in self.layers if number not in known]
        wrong += [f"layer {number} sees only {known[number].edges[0]} tokens, which is linear as it is"
                  for number in self.layers if number in known and known[number].edges]
        return [*wrong, *(["a layer is named twice"] if len(set(self.layers)) < len(self.layers) else [])]

    def digest(self, layers: tuple[AttentionSpec, ...]) -> str:
        """sha256 of all tables of a model."""
        made = hashlib.sha256()
        for layer in layers:
            if layer.layer in self.layers:
                made.update(repr((layer.layer, fractions(self.seed, layer.layer, layer.kv_num_heads,
                                                         self.setting.samples))).encode())
                made.update(repr([[round(x, 6) for x in row] for row in
                                  projections(self.seed, layer.layer, layer.head_size)]).encode())
        return made.hexdigest()


def fractions(seed: int, layer: int, kv_heads: int, samples: int) -> list[list[int]]:
    """The table of a layer, [K, m]: the same on every machine, for ever."""
    numbers = _numbers(f"gqa-export/fractions/{seed}/{layer}")
    return [[next(numbers) % STEPS for _ in range(samples)] for _ in range(kv_heads)]


def projections(seed: int, layer: int, head_size: int, count: int = PROJECTIONS) -> list[list[float]]:
    """The directions of a layer's hash, [D, r]: independent normal numbers."""
    numbers = _numbers(f"gqa-export/projections/{seed}/{layer}")

    def normal() -> float:
        radius, angle = (next(numbers) + 1) / 2**32, next(numbers) / 2**32
        return math.sqrt(-2 * math.log(radius)) * math.cos(2 * math.pi * angle)

    return [[normal() for _ in range(count)] for _ in range(head_size)]


def code_order(count: int = PROJECTIONS) -> list[int]:
    """Place of every code of `count` bits in the order of the reflected Gray code, [2^r]."""
    places = [0] * (1 << count)
    for place in range(1 << count):
        places[place ^ place >> 1] = place
    return places


def segments(leaf_number: int) -> list[tuple[int, int]]:
    """(first leaf, leaves) of the parts into which the recursion of HyperAttention splits what lies before a leaf."""
    parts, rest = [], leaf_number
    while rest:
        lowest = rest & -rest
        rest -= lowest
        parts.append((rest, lowest))
    return parts


def _numbers(label: str) -> Iterator[int]:
    """Numbers below 2^32 that only depend on the label."""
    counter = 0
    while True:
        digest = hashlib.sha256(f"{label}/{counter}".encode()).digest()
        yield from (int.from_bytes(digest[i: i + 4], "little") for i in range(0, len(digest), 4))
        counter += 1
