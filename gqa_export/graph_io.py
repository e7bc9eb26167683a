"""Names, order and axes of a bundle's graph inputs and outputs. The one place that spells them.

`ort`, `onnx`, `portable` take `input_ids` [batch, sequence] and `attention_mask` [batch, past + sequence] (1 is a
real token); `trt-*` take `input_ids`, `past_lengths` and `new_lengths`. Then the caches, layer by layer (of those that
have one), key before value; then the states of fixed size. K, D and E are literal in every shape, the slots of a ring
and for `trt-*` the capacity too; the other axes are named. Cache layout is BNSH: [B, K, T, D].
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from .spec import STRICT, AttentionSpec, Count, KvCache, Limits, ModelSpec, StateSpec, Text, WindowCache

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
PAST_LENGTHS = "past_lengths"
NEW_LENGTHS = "new_lengths"
LOGITS = "logits"
HIDDEN_STATES = "hidden_states"
"""what the model's head reads, for heads that draft tokens: the last hidden state of every new token, after the final
norm. Source: transformers' `hidden_states[-1]`, which its MTP heads take; onnxruntime-genai's builder has this name"""
RECIPE = "weights:"
"""what the external location of an initializer without bytes begins with: `weights:NAME`, or `weights:A+B+C` for rows
concatenated along axis 0"""

EXACT_PRODUCTS = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""session options with which ONNX Runtime does not round the input of the product that it makes of DequantizeLinear +
MatMul; without them it does (accuracy level 4)"""

BATCH = "batch"
SEQUENCE = "sequence"
PAST = "past_sequence"
TOTAL = "total_sequence"
CAPACITY = "capacity"


@dataclass(frozen=True)
class TensorFact:
    """A graph input or output: numpy-style dtype name and shape; a string in the shape is a named axis."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: Text
    dtype: Text
    shape: Annotated[tuple[Count | Text, ...], Limits(max_length=8, fail_fast=True)]


def past_names(layer: int) -> tuple[str, str]:
    """Names of a layer's cache inputs: key, value."""
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    """Names of a layer's cache outputs: key, value."""
    return f"present.{layer}.key", f"present.{layer}.value"


_CACHE_NAME = re.compile(r"(?:past_key_values|present)\.(0|[1-9][0-9]*)\.(?:key|value)")


def layer_of_cache(name: str) -> int | None:
    """The number of the layer whose cache an input or output of this name is; None for any other name."""
    found = _CACHE_NAME.fullmatch(name)
    return int(found[1]) if found else None


class CacheReaders:
    """Tells which layer a call of attention is, by the cache that it reads. Calls that read one cache come in the order
    of their layers: what a layer asks for depends on what the layers before it answered."""

    def __init__(self, spec: ModelSpec) -> None:
        self._left = {past_names(number)[0]: list(layers) for number, layers in spec.reading().items()}

    def take(self, past_key: str) -> AttentionSpec | None:
        """The layer of the next call, in graph order, that reads this input; None where no layer is left."""
        left = self._left.get(past_key)
        return left.pop(0) if left else None


_KEPT_NAME = re.compile(r"(past_key_values|present)\.(0|[1-9][0-9]*)\.(key|value|conv_state|recurrent_state)"
                        r"(?:_([1-9][0-9]*))?")


def in_layer(name: str, old: int, new: int) -> str:
    """The name of the same cache or state in layer `new`, where `name` is one of layer `old`; else the name itself."""
    found = _KEPT_NAME.fullmatch(name)
    if found is None or int(found[2]) != old:
        return name
    return f"{found[1]}.{new}.{name.split('.', 2)[2]}"


def place_of_cache(name: str) -> tuple[int, int, str, int]:
    """By what the inputs, or the outputs, of caches and states are ordered: keys and values by layer, then states."""
    found = _KEPT_NAME.fullmatch(name)
    assert found is not None, name
    return int(found[3].endswith("_state")), int(found[2]), found[3], int(found[4] or 0)


def past_state(state: StateSpec) -> str:
    """Name of the input of a state of fixed size. Source: the names that onnxruntime-genai looks for (0.18)."""
    return f"past_key_values.{state.layer}.{state.name}"


def present_state(state: StateSpec) -> str:
    """Name of the output of a state of fixed size."""
    return f"present.{state.layer}.{state.name}"


def cache_inputs(spec: ModelSpec, dtype: str, cache: str, capacity: int | str = CAPACITY,
                 kv: KvCache | None = None, windows: WindowCache | None = None) -> tuple[TensorFact, ...]:
    """Cache inputs of all layers and the states, in graph order. Arguments as of `graph_inputs`."""
    axis = PAST if cache == "growing" else capacity
    return (*_cache_facts(spec, dtype, axis, past_names, kv, windows), *_state_facts(spec, past_state))


def cache_outputs(spec: ModelSpec, dtype: str, cache: str, capacity: int | str = CAPACITY,
                  kv: KvCache | None = None, windows: WindowCache | None = None) -> tuple[TensorFact, ...]:
    """Cache outputs of all layers and the states, in graph order. Arguments as of `graph_inputs`."""
    axis = TOTAL if cache == "growing" else capacity
    return (*_cache_facts(spec, dtype, axis, present_names, kv, windows), *_state_facts(spec, present_state))


def _cache_facts(spec: ModelSpec, dtype: str, axis: int | str, names: Callable[[int], tuple[str, str]],
                 kv: KvCache | None, windows: WindowCache | None) -> tuple[TensorFact, ...]:
    facts = []
    element, width = (dtype, int) if kv is None else (kv.dtype, kv.width)
    for layer in spec.owners:
        key, value = names(layer.layer)
        tokens = windows.slots(layer) or axis if windows else axis
        facts.append(TensorFact(key, element, (BATCH, layer.kv_num_heads, tokens, width(layer.head_size))))
        facts.append(TensorFact(value, element, (BATCH, layer.kv_num_heads, tokens, width(layer.value_head_size))))
    return tuple(facts)


def _state_facts(spec: ModelSpec, name: Callable[[StateSpec], str]) -> tuple[TensorFact, ...]:
    return tuple(TensorFact(name(state), state.dtype, (BATCH, *state.shape)) for state in spec.states)


def graph_inputs(spec: ModelSpec, dtype: str, cache: str, interface: str = "mask",
                 capacity: int | str = CAPACITY, kv: KvCache | None = None,
                 windows: WindowCache | None = None) -> tuple[TensorFact, ...]:
    """All inputs of a bundle's graph, in order.

    Args:
        spec: the model.
        dtype: of the cache, a numpy name such as "float32".
        cache: "growing" or "static".
        interface: "mask" (`ort`, `onnx`, `portable`) or "lengths" (`trt-*`, all int32).
        capacity: tokens of a static cache where that is literal (`trt-*`); the named axis where it is not.
        kv: how the cache is quantized; None: it is not.
        windows: layers whose cache is a ring of fewer slots; None: no layer's is.
    """
    if interface == "mask":
        head = [TensorFact(INPUT_IDS, "int64", (BATCH, SEQUENCE)), TensorFact(ATTENTION_MASK, "int64", (BATCH, TOTAL))]
    else:
        head = [TensorFact(INPUT_IDS, "int32", (BATCH, SEQUENCE)),
                *(TensorFact(name, "int32", (BATCH,)) for name in (PAST_LENGTHS, NEW_LENGTHS))]
    return (*head, *cache_inputs(spec, dtype, cache, capacity, kv, windows))


def graph_outputs(spec: ModelSpec, dtype: str, cache: str, logits: str, capacity: int | str = CAPACITY,
                  kv: KvCache | None = None, hidden: bool = False,
                  windows: WindowCache | None = None) -> tuple[TensorFact, ...]:
    """All outputs of a bundle's graph, in order.

    Args:
        spec: the model.
        dtype: of logits and cache, a numpy name such as "float32".
        cache: "growing" or "static".
        logits: "all" gives [batch, sequence, vocabulary], "last" [batch, 1, vocabulary].
        capacity, kv, windows: as of `graph_inputs`.
        hidden: the last hidden states are an output too, [batch, sequence, hidden size], whatever `logits` is.
    """
    rows: int | str = SEQUENCE if logits == "all" else 1
    states = (TensorFact(HIDDEN_STATES, dtype, (BATCH, SEQUENCE, spec.hidden_size)),) if hidden else ()
    return (TensorFact(LOGITS, dtype, (BATCH, rows, spec.vocabulary)), *states,
            *cache_outputs(spec, dtype, cache, capacity, kv, windows))
