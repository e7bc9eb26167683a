"""What a decoder is, as far as attention and what it keeps between steps are concerned: frozen facts, by layer.

`AttentionSpec` is filled from what each layer really passes to attention and what its mask really computes, `StateSpec`
from what it really passes to its convolutions and recurrences, never from a model's name. Dimensions as in
`gqa_export.attention_op`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Annotated, Any, ClassVar

LARGEST = 1 << 31
"""The largest dimension of a model that is read from a file: no product of two overflows 64 bits."""
MOST_LAYERS = 1 << 14
DEFAULT_CAPACITY = 4096
"""tokens that a cache holds unless told otherwise, where the model has that many positions"""
STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
"""How pydantic reads a frozen dataclass from a file: no unknown field, no conversion of types, finite numbers only."""


class Limits:
    """Bounds of a value that is read from a file, for `Annotated`: the keywords of pydantic's core schema (ge, le,
    max_length, pattern, ...). They bind readers (`gqa_export.bundle.manifest`) and the JSON schema that is generated,
    not the constructor. The standard library is enough until something is read."""

    def __init__(self, **limits: Any) -> None:
        self.limits = limits

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {**handler(source), **self.limits}


class OneOf:
    """A closed set of values, for `Annotated`; as `Limits`."""

    def __init__(self, *values: str | int) -> None:
        self.values = values

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> dict[str, Any]:
        return {"type": "literal", "expected": list(self.values)}


FAIL_FAST = Limits(fail_fast=True)
"""for collections: the first wrong entry ends the reading"""
Text = Annotated[str, Limits(max_length=4096, pattern="^[^\\u0000-\\u0008\\u000b-\\u001f\\u007f]*$")]
"""without the characters that end a file name or drive a terminal"""
Count = Annotated[int, Limits(ge=0, le=LARGEST)]
Size = Annotated[int, Limits(ge=1, le=LARGEST)]
Heads = Annotated[int, Limits(ge=1, le=1 << 20)]
Layer = Annotated[int, Limits(ge=0, le=MOST_LAYERS)]


@dataclass(frozen=True)
class AttentionSpec:
    """One attention layer. `window` counts the current token, 0 is all; `softcap` 0 is none. `cached_alike`: PyTorch's
    own cache holds these keys and values too (not so where it holds latents, or another layer's), so that the two
    caches can be compared; the logits always are. `chunk`: a token sees those before it in its own chunk of so many
    positions, the first of which begins with the sequence; 0 is no chunks. A layer with chunks has no window. `owner`:
    the layer before it whose keys and values it reads in place of its own, so that it has no cache; None: its own."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    layer: Layer
    num_heads: Heads
    kv_num_heads: Heads
    head_size: Heads
    value_head_size: Heads
    scale: float
    softcap: float = 0.0
    window: Count = 0
    sinks: bool = False
    cached_alike: bool = True
    chunk: Count = 0
    owner: Layer | None = None

    @property
    def cache(self) -> int:
        """The number of the layer whose cache it reads: its own, or its owner's."""
        return self.layer if self.owner is None else self.owner

    @property
    def visible(self) -> int:
        """What the op's attribute `window` says: the window, or a chunk's size below zero."""
        return -self.chunk or self.window

    @property
    def edges(self) -> tuple[int, ...]:
        """Lengths beyond which tokens are out of sight: the window, or the ends of the first two chunks."""
        return tuple(size for size in (self.window, self.chunk, 2 * self.chunk) if size)

    def cache_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of keys and values that one token adds to this layer's cache."""
        return self.kv_num_heads * (self.head_size + self.value_head_size) * element_bytes


@dataclass(frozen=True)
class KvScales:
    """How one layer's keys and values are quantized. key, value: what a code is multiplied by. key_clip, value_clip:
    the share of the calibration text's numbers that are clipped."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    layer: Layer
    key: Annotated[float, Limits(gt=0)]
    value: Annotated[float, Limits(gt=0)]
    key_clip: Annotated[float, Limits(ge=0, le=1)] = 0.0
    value_clip: Annotated[float, Limits(ge=0, le=1)] = 0.0


@dataclass(frozen=True)
class KvCache:
    """A cache of codes in place of numbers (`gqa_export.quantized.kv_codes` has the rule).

    Attributes:
        bits: of a code, 8 or 4.
        scales: of every layer, in the order of `ModelSpec.layers`; one for all keys of a layer, one for all values.
        calibration: sha256 of the token ids that the scales were chosen from. tokens: how many.
        codes: whole numbers ("int") or 8-bit floats with 4 bits of exponent and 3 of mantissa ("fp8").
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    bits: Annotated[int, OneOf(4, 8)]
    scales: Annotated[tuple[KvScales, ...], Limits(max_length=MOST_LAYERS, fail_fast=True)]
    calibration: Annotated[str, Limits(pattern="^[0-9a-f]{64}$")] = "0" * 64
    tokens: Count = 0
    codes: Annotated[str, OneOf("int", "fp8")] = "int"

    @property
    def kind(self) -> str:
        """As `--kv-cache` names it: "int8", "int4" or "fp8"."""
        return "fp8" if self.codes == "fp8" else f"int{self.bits}"

    @property
    def dtype(self) -> str:
        """Number format of the cache tensors: "int8", "uint8" with two codes a byte, or "float8_e4m3fn"."""
        return {"int8": "int8", "int4": "uint8", "fp8": "float8_e4m3fn"}[self.kind]

    def width(self, size: int) -> int:
        """Last dimension of a cache tensor whose heads have this size."""
        return size * self.bits // 8


@dataclass(frozen=True)
class WindowCache:
    """Layers with a window whose static cache is a ring of `window + chunk` slots in place of the whole capacity: token
    t lies in slot t modulo the slots, and no row can see what it displaces.

    Attributes:
        chunk: new tokens of a sequence that one call may bring; sessions cut longer prompts into pieces.
        layers: their numbers, ascending.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    chunk: Size
    layers: Annotated[tuple[Layer, ...], Limits(min_length=1, max_length=MOST_LAYERS, fail_fast=True)]

    def slots(self, layer: AttentionSpec) -> int:
        """Slots of the ring that a layer reads; 0 for a layer that reads a cache of the whole capacity."""
        return layer.window + self.chunk if layer.cache in self.layers else 0

    @classmethod
    def of(cls, layers: Iterable[AttentionSpec], capacity: int, chunk: int) -> WindowCache | None:
        """The ring of every layer that keeps less by it than `capacity` tokens; None where no layer does. Layers that
        read one cache have a ring if they see as far as one another."""
        seen: dict[int, set[int]] = {}
        for each in layers:
            seen.setdefault(each.cache, set()).add(each.window)
        numbers = tuple(sorted(number for number, windows in seen.items()
                               if len(windows) == 1 and 0 < min(windows) < capacity - chunk))
        return cls(chunk, numbers) if numbers else None


@dataclass(frozen=True)
class StateSpec:
    """One state of fixed size that a layer keeps beside, or in place of, keys and values.

    Attributes:
        layer: the number of the layer.
        kind: "conv" (the last inputs of a causal convolution) or "recurrent" (the matrix of a linear recurrence).
        index: number of the state among those of its kind in its layer.
        kernel: the name under which transformers calls the function that reads and writes it.
        shape: of one sequence's state: (channels, kernel - 1), or (heads, key size, value size).
        dtype: numpy name; fp32 whatever the format of the activations.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    layer: Layer
    kind: Annotated[str, OneOf("conv", "recurrent")]
    index: Annotated[int, Limits(ge=0, le=1 << 10)]
    kernel: Text
    shape: Annotated[tuple[Size, ...], Limits(min_length=2, max_length=3, fail_fast=True)]
    dtype: Annotated[str, OneOf("float32")] = "float32"

    @property
    def name(self) -> str:
        """What it is called among the states of its layer: conv_state, recurrent_state, conv_state_1 ..."""
        return f"{self.kind}_state" + (f"_{self.index}" if self.index else "")

    @property
    def axes(self) -> tuple[str, ...]:
        """What each number of `shape` counts."""
        return STATE_AXES[self.kind]

    @property
    def bytes(self) -> int:
        """Bytes of one sequence's state, however long the sequence is."""
        return 4 * prod(self.shape)


STATE_AXES = {"conv": ("channels", "past inputs"), "recurrent": ("heads", "key size", "value size")}
"""kind of a state -> what its axes count, without the batch"""


@dataclass(frozen=True)
class ModelSpec:
    """A whole decoder. `max_positions` is the longest sequence it was made for; `rope` its rotary type or "".
    `rope_switch`: a sequence of more tokens than this is rotated by another table (`longrope`), 0: one table for all.
    `layers` are those with attention, `states` what other layers (or these too) keep; a layer may have neither.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    model_type: Text
    architecture: Text
    vocabulary: Size
    hidden_size: Count
    max_positions: Count
    rope: Text
    layers: Annotated[tuple[AttentionSpec, ...], Limits(max_length=MOST_LAYERS, fail_fast=True)]
    rope_switch: Count = 0
    states: Annotated[tuple[StateSpec, ...], Limits(max_length=4 * MOST_LAYERS, fail_fast=True)] = ()

    @property
    def depth(self) -> int:
        """How many layers the decoder has, as far as what they keep shows."""
        numbers = [layer.layer for layer in self.layers] + [state.layer for state in self.states]
        return 1 + max(numbers, default=-1)

    @property
    def owners(self) -> tuple[AttentionSpec, ...]:
        """The layers that keep keys and values, one cache each, in order; the others read those of one of them."""
        return tuple(layer for layer in self.layers if layer.owner is None)

    def reading(self) -> dict[int, list[AttentionSpec]]:
        """Number of an owner -> the layers that read its cache, itself first, in order."""
        found: dict[int, list[AttentionSpec]] = {}
        for layer in self.layers:
            found.setdefault(layer.cache, []).append(layer)
        return found

    @property
    def state_bytes(self) -> int:
        """Bytes of all states of one sequence, constant in its length."""
        return sum(state.bytes for state in self.states)

    def states_of(self, kind: str) -> tuple[StateSpec, ...]:
        """The states of one kind, in order."""
        return tuple(state for state in self.states if state.kind == kind)

    def cache_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of keys and values that one token adds to the whole cache."""
        return sum(layer.cache_bytes_per_token(element_bytes) for layer in self.owners)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelSpec:
        """The inverse of `to_dict`; raises TypeError or KeyError on data of another shape."""
        rest = {name: value for name, value in data.items() if name not in ("layers", "states")}
        states = tuple(StateSpec(**{**state, "shape": tuple(state["shape"])}) for state in data.get("states", ()))
        return cls(layers=tuple(AttentionSpec(**layer) for layer in data["layers"]), states=states, **rest)


DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""number formats of bundles: the name that options take -> the name of numpy and ml_dtypes, which is used elsewhere"""
FLOATS = {**DTYPES, "fp64": "float64"}
"""the same with the format of the reference"""
SHORT_DTYPES = {name: short for short, name in FLOATS.items()}


@dataclass(frozen=True)
class Fallback:
    """A layer that the target's best op could not hold: what was wanted, what was used, why. layer -1: the model."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    layer: Annotated[int, Limits(ge=-1, le=MOST_LAYERS)]
    wanted: Text
    used: Text
    reason: Text
