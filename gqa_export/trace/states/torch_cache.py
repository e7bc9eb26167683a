"""transformers' own cache of a model that keeps states, read as an export keeps them.

transformers keeps as many past inputs of a convolution as its kernel is long, the op one less; state-space layers keep
their matrix transposed. Which states there are is found by running the model's code without weights.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ...checkpoint.state_kernels import keeps_states
from ...spec import StateSpec
from .kernels import AS_CACHED, STARTS_FROM_NOTHING

_found: dict[str, tuple[StateSpec, ...]] = {}


def observed_states(config: Any) -> tuple[StateSpec, ...]:
    """The states of the models of a transformers configuration, by layer; none for those of attention alone.

    Raises:
        UnsupportedModel: a state of theirs cannot be followed.
    """
    if not keeps_states(config):
        return ()
    key = f"{type(config).__module__} {config.to_json_string(use_diff=False)}"
    if key not in _found:
        from .. import attention_hook, skeleton
        from ..patches import registry
        from ..probe import rotary
        from ..probe.layer_probe import listen_with_cache

        with registry.applied(config):
            model = skeleton.build(config, torch.float32, device="meta", attention=attention_hook.register())
            rotary.settle(model, 1)
            *_, states = listen_with_cache(model)
        _found[key] = states
    return _found[key]


@functools.cache
def _without_keys() -> type:
    """The class of a cache without keys, which is told how many tokens it has seen: transformers counts keys, raises
    where no layer has any, and counts them for masks and positions of every hybrid (LFM2, Nemotron-H), though no layer
    of it be one with attention."""
    from transformers import DynamicCache

    class WithoutKeys(DynamicCache):
        """tokens: seen before this call."""

        tokens = 0

        def get_seq_length(self, layer_idx: int = 0) -> int:
            """Tokens seen before."""
            return self.tokens

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            """Length and offset of what a mask is over."""
            return self.tokens + query_length, 0

    return WithoutKeys


def says_length(cache: Any, tokens: int) -> None:
    """Tell a cache without keys that it has seen so many tokens; any other counts its own."""
    if isinstance(cache, _without_keys()):
        cache.tokens = tokens  # type: ignore[attr-defined]


def empty_cache(config: Any) -> Any:
    """A cache of transformers that keeps everything, with room for the states of fixed size that its model keeps."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionAndFullAttentionLayer

    cache = DynamicCache(config=config)
    for place, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicSlidingWindowLayer):
            states_too = getattr(layer, "number_of_states", 0)
            cache.layers[place] = LinearAttentionAndFullAttentionLayer(number_of_states=states_too) if states_too \
                else DynamicLayer()
    if not any(map(has_keys, cache.layers)):
        cache.__class__ = _without_keys()
    return cache


def has_keys(layer: Any) -> bool:
    """Whether an entry of a cache is of a layer with attention: others have states alone, or nothing (`mlp`)."""
    from transformers.cache_utils import CacheLayerMixin

    return isinstance(layer, CacheLayerMixin)


def kept_states(states: tuple[StateSpec, ...], past: int, new: int) -> list[tuple[int, int]]:
    """In which pieces (start, stop) a sequence takes its new tokens, so that its states go on from the past: at once,
    but one by one where transformers' own code for several tokens forgets a state.

    Args:
        states: of the model.
        past: tokens of the sequence so far.
        new: tokens that it brings.
    """
    if past and any(state.kernel in STARTS_FROM_NOTHING for state in states):
        return [(token, token + 1) for token in range(new)]
    return [(0, new)] if new else []


def states_of_row(cache: Any, states: tuple[StateSpec, ...]) -> list[torch.Tensor | None]:
    """Each state of a cache of one sequence, in the shape of its spec; None where it was not filled yet."""
    found: list[torch.Tensor | None] = []
    for state in states:
        kept = getattr(cache.layers[state.layer], f"{state.kind}_states")[state.index]
        if kept is None:
            found.append(None)
        elif state.kind == "conv":
            found.append(kept[0, :, -state.shape[-1]:])
        else:
            arranged = AS_CACHED.get(state.kernel)
            found.append(kept[0] if arranged is None else arranged(kept[0]))
    return found
