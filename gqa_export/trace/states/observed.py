"""The states of a model, from one run of it without weights: number, shapes and kernels as the layers show them."""

from __future__ import annotations

import torch

from ...errors import UnsupportedModel
from ...spec import StateSpec
from .stand_in_cache import Convolution, Recurrence


class StateListener:
    """Notes every convolution and recurrence of a run, and answers with empty tensors of the right shape."""

    def __init__(self) -> None:
        self.states: dict[tuple[int, str, int], StateSpec] = {}

    def convolve(self, call: Convolution) -> torch.Tensor:
        """See `StateRecorder`."""
        channels, taps = call.weight.shape
        self._note(StateSpec(call.layer, "conv", call.index, call.kernel, (int(channels), int(taps) - 1)))
        self.note_step(f"convolution {call.index} {call.kernel} {call.activation}", call.x, call.weight, call.bias)
        return torch.empty_like(call.x)

    def recur(self, call: Recurrence) -> tuple[torch.Tensor, torch.Tensor]:
        """See `StateRecorder`."""
        batch, _, heads, value_size = call.value.shape
        shape = (int(heads), int(call.query.shape[-1]), int(value_size))
        self._note(StateSpec(call.layer, "recurrent", call.index, call.kernel, shape))
        self.note_step(f"recurrence {call.index} {call.kernel} {call.rule} {call.scale!r}", call.query, call.key,
                       call.value, call.decay, call.beta)
        return torch.empty_like(call.value), call.value.new_empty(batch, *shape)

    def steps_alone(self) -> torch.Tensor | None:
        """See `StateRecorder`: no shape depends on it."""
        return None

    def note_step(self, name: str, *tensors: torch.Tensor | None) -> None:
        """Take note of a step that is no operation of PyTorch; for listeners that compare layers."""

    def found(self) -> tuple[StateSpec, ...]:
        """All states: by layer, those of convolutions first."""
        return tuple(self.states[key] for key in sorted(self.states))

    def _note(self, state: StateSpec) -> None:
        key = state.layer, state.kind, state.index
        if key in self.states:
            raise UnsupportedModel(f"a layer uses its {state.name} more than once in a step", f"layer {state.layer}",
                                   "a step of such a layer is not one convolution or recurrence; it is not supported",
                                   code="E-MODEL-STATE-TWICE")
        self.states[key] = state
