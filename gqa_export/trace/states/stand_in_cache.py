"""The cache that a model is given while it is probed or traced: it has no content, and sees where states come and go.

A layer takes a state from the cache, calls a kernel function (see `kernels`) and gives the new state back. This cache
answers that there is no state, so that every model takes its general path, whatever the number of new tokens; the
kernel functions read the state themselves, and this cache says of which layer. What does not follow that order (a
state that no kernel function uses, another tensor given back, another method) is refused: it would be lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch

from ...errors import UnsupportedModel

FIX = "such a state cannot be followed from step to step; the model is refused rather than exported wrong"


@dataclass(frozen=True)
class Convolution:
    """A causal convolution as a layer called it.

    Attributes:
        layer, index: of its state. kernel: the name of the kernel function.
        x: [batch, channels, tokens]. weight: [channels, kernel size]. bias: [channels] or None.
        activation: "" or "silu".
    """

    layer: int
    index: int
    kernel: str
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    activation: str


@dataclass(frozen=True)
class Recurrence:
    """A linear recurrence as a layer called it, in the terms of `gqa_export.state_ops`, all tensors fp32.

    Attributes:
        layer, index: of its state. kernel: the name of the kernel function.
        query, key: [batch, tokens, heads or a divisor, key size]. value: [batch, tokens, heads, value size].
        decay: [batch, tokens, heads] or with a key axis; None is none. beta: [batch, tokens, heads] or None.
        rule: "linear", "gated", "delta" or "gated_delta". scale: of the queries.
    """

    layer: int
    index: int
    kernel: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    decay: torch.Tensor | None
    beta: torch.Tensor | None
    rule: str
    scale: float


class StateRecorder(Protocol):
    """Computes the convolutions and recurrences of a model."""

    def convolve(self, call: Convolution) -> torch.Tensor:
        """Return y [batch, channels, tokens]."""

    def recur(self, call: Recurrence) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output [batch, tokens, heads, value size] and the new state."""

    def steps_alone(self) -> torch.Tensor | None:
        """bool [batch]: the rows that bring one token to a state they have; None where it makes no difference."""


class StandInCache:
    """See the module. `recorder` computes what the kernel functions are called for."""

    is_compileable = False
    is_initialized = True

    def __init__(self, recorder: StateRecorder) -> None:
        self.recorder = recorder
        self.stored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """keys and values as layers gave them"""
        self._asked: list[tuple[int, int]] = []
        self._last: tuple[int, int] | None = None
        self._inputs: list[tuple[torch.Tensor, int, int]] = []
        self._results: list[tuple[torch.Tensor, int, int]] = []

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any,
               **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """New keys and values of a layer: attention gets these alone, and the past elsewhere."""
        self.stored[layer] = (key, value)
        return key, value

    def layer_of(self, key: torch.Tensor) -> int | None:
        """The layer that gave these keys; None where they were made after the cache (from latents)."""
        return next((layer for layer, (stored, _) in self.stored.items() if stored is key), None)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Nothing: the convolution reads its state itself."""

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0,
                          conv_kernel_size: int | None = None, **others: Any) -> torch.Tensor:
        """New inputs of a convolution; a view of them, by which the convolution is known when it comes."""
        self._refuse_words("update_conv_state", layer_idx, others)
        inputs = conv_states.view_as(conv_states)
        self._inputs.append((inputs, int(layer_idx), int(state_idx)))
        return inputs

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Nothing: the next recurrence reads this state itself."""
        self._asked.append((int(layer_idx), int(state_idx)))

    def update_recurrent_state(self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0,
                               **others: Any) -> torch.Tensor:
        """The new state of a recurrence, as it was returned."""
        self._refuse_words("update_recurrent_state", layer_idx, others)
        for place, (result, layer, index) in enumerate(self._results):
            if result is recurrent_states and (layer, index) == (int(layer_idx), int(state_idx)):
                del self._results[place]
                return recurrent_states
        _refuse("a layer keeps a recurrent state that is not the one its kernel function returned", layer_idx)

    def convolution(self, x: torch.Tensor) -> tuple[int, int] | None:
        """Layer and index of the state of a convolution with these inputs; None: they did not pass through here."""
        for place, (inputs, layer, index) in enumerate(self._inputs):
            if inputs is x:
                del self._inputs[place]
                return layer, index
        return None

    def recurrence(self) -> tuple[int, int] | None:
        """Layer and index of the state of the next recurrence; None: no layer has taken one."""
        self._last = self._asked.pop(0) if self._asked else None
        return self._last

    def shares(self) -> bool:
        """Whether the recurrence that just ran had a state of the cache, so that a further one has to share it."""
        return self._last is not None

    def returns(self, state: torch.Tensor, layer: int, index: int) -> None:
        """A kernel function returns `state`, which its layer has to give back."""
        self._results.append((state, layer, index))

    def finish(self) -> None:
        """At the end of a run: every state that was taken was used, and every new one given back.

        Raises:
            UnsupportedModel: one was not.
        """
        if self._inputs:
            _refuse("a layer keeps inputs of a convolution that no kernel function computes", self._inputs[0][1])
        if self._asked:
            _refuse("a layer takes a recurrent state that no kernel function uses", self._asked[0][0])
        if self._results:
            _refuse("a layer does not keep the new state of its recurrence", self._results[0][1])

    def get_seq_length(self, *_: Any) -> int:
        """Nothing is cached."""
        return 0

    def get_query_offset(self, *_: Any) -> int:
        """Nothing is cached."""
        return 0

    def get_mask_sizes(self, query_length: int, *_: Any) -> tuple[int, int]:
        """Length of the keys and where they begin: the new tokens."""
        return query_length, 0

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        """No: see `get_recurrent_state`."""
        return False

    def is_recording_past(self, *_: Any) -> bool:
        """Yes: then no model takes its way for a single token."""
        return True

    @property
    def is_sliding(self) -> list[bool]:
        """No layer's cache is cut."""
        return []

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the model uses `{name}` of its cache, which gqa-export does not know")

    def _refuse_words(self, method: str, layer: int, others: dict[str, Any]) -> None:
        for name, given in others.items():
            if given is not None:
                _refuse(f"a layer calls {method} with `{name}`, which gqa-export does not know", layer)


def _refuse(what: str, layer: int) -> NoReturn:
    raise UnsupportedModel(what, f"layer {layer}", FIX, code="E-MODEL-STATE-PATH")


_caches: list[StandInCache] = []


@contextmanager
def listening(cache: StandInCache) -> Iterator[None]:
    """Inside, kernel functions find their states by this cache. At the end of a run call `cache.finish()`."""
    _caches.append(cache)
    try:
        yield
    finally:
        _caches.pop()


def current() -> StandInCache | None:
    """The cache of the run that is going on; None: the model runs as it is."""
    return _caches[-1] if _caches else None
