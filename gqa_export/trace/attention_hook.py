"""The two functions registered with `transformers`: attention and mask. No model is known here by name.

`attention` receives every layer's query, key and value, already rotated, with that layer's scale, softcap and sinks
as call arguments; it hands them to the `Recorder` in charge. `mask` builds no mask: it returns a tagged 1x1x1x1
tensor that carries the mask function it was called with, for `probe` to evaluate. Source: transformers
`AttentionInterface` and `AttentionMaskInterface`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..errors import GqaExportError, UnsupportedModel
from .states.stand_in_cache import current

NAME = "gqa_export"

# Arguments that reach attention but do not change its result once mask, scale, softcap and sinks are known.
# `sliding_window`, `is_causal`: eager attention, the reference, uses the mask alone, and so does the probe.
WITHOUT_EFFECT = frozenset({
    "dropout", "sliding_window", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions",
    "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep", "past_key_values", "layer_idx",
    "num_items_in_batch", "position_embeddings", "deterministic", "training",
})

# Arguments that reach the mask but do not change which keys a token sees: `mask_function` has all of that.
# `local_size`: transformers' own masks use it only to see that a window is wider than the keys.
MASK_WITHOUT_EFFECT = frozenset({
    "allow_is_causal_skip", "allow_is_bidirectional_skip", "config", "dtype", "local_size",
})


@dataclass(frozen=True)
class Call:
    """One attention call as a layer made it.

    Attributes:
        module: the layer's attention module.
        layer: the layer's number.
        query: [batch, heads, tokens, head_size], already rotated.
        key: [batch, kv_heads, tokens, head_size], already rotated.
        value: [batch, kv_heads, tokens, value_head_size].
        mask: the tagged mask; None or untagged where the model made its own.
        scale: factor of the scores.
        softcap: limit of the scores, 0 is none.
        sinks: [heads], one extra logit per head; None is none.
    """

    module: torch.nn.Module
    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    softcap: float
    sinks: torch.Tensor | None


@dataclass(frozen=True)
class MaskTag:
    """The arguments of a mask: transformers' mask function and whether it needs vmap."""

    function: Callable[..., Any]
    use_vmap: bool
    padding: torch.Tensor | None


class Recorder(Protocol):
    """Computes the attention calls of a model."""

    def attend(self, call: Call) -> torch.Tensor:
        """Return the attention output [B, S, H, E]."""


_recorders: list[tuple[Recorder, torch.Tensor | None]] = []


@contextmanager
def recording(recorder: Recorder, position_ids: torch.Tensor | None = None) -> Iterator[None]:
    """Let a recorder compute the attention calls made inside the block.

    Args:
        recorder: its `attend` is given every call.
        position_ids: [batch, tokens], the position of each new token in its sequence; only patched models need them.
    """
    _recorders.append((recorder, position_ids))
    try:
        yield
    finally:
        _recorders.pop()


def positions() -> torch.Tensor:
    """The position [B, S] of each new token in its sequence, for functions patched into a model."""
    found = _recorders[-1][1]
    if found is None:
        raise GqaExportError("a patched model needs position_ids, and recording() was called without them", "recording",
                             "pass position_ids to recording(); this is a bug in gqa-export", code="E-MODEL-POSITIONS")
    return found


def attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
              attention_mask: torch.Tensor | None, scaling: float | None = None, softcap: float | None = None,
              s_aux: torch.Tensor | None = None, *, layer: int | None = None,
              **others: Any) -> tuple[torch.Tensor, None]:
    """The function that transformers calls for every layer's attention; the recorder in charge answers.

    Args:
        module: the layer's attention module.
        query: [batch, heads, tokens, head_size], already rotated.
        key: [batch, kv_heads, tokens, head_size], already rotated.
        value: [batch, kv_heads, tokens, value_head_size].
        attention_mask: what `mask` returned.
        scaling: factor of the scores; None is 1 / sqrt(head_size).
        softcap: limit of the scores; None does not limit them.
        s_aux: sinks [heads], one extra logit per head; None is none.
        layer: the layer's number where the module does not have `layer_idx` (patched models).
        **others: refused unless they are known to leave the result as it is.

    Returns:
        The attention output [batch, tokens, heads, value_head_size], and None for the weights.

    Raises:
        UnsupportedModel: an argument is not understood, or the layer's number is not known.
    """
    cache = current()
    shared = cache.layer_of(key) if cache is not None else None  # one module may serve several layers
    layer = shared if shared is not None else getattr(module, "layer_idx", None) if layer is None else layer
    for name, value_given in others.items():
        if name in WITHOUT_EFFECT or value_given is None or value_given is False:
            continue
        raise UnsupportedModel(f"attention is called with `{name}`, which grouped-query attention cannot represent",
                               f"layer {layer}, {type(module).__name__}",
                               "this model's attention needs more than a cache, a window, a softcap and sinks; "
                               "it is not supported", code="E-MODEL-ATTENTION-ARGUMENT")
    if layer is None:
        raise UnsupportedModel("an attention module does not have a layer index, so its cache cannot be found",
                               type(module).__name__, "this model is not a decoder of the kind that gqa-export knows",
                               code="E-MODEL-LAYER-INDEX")
    scale = float(query.shape[-1]) ** -0.5 if scaling is None else float(scaling)
    call = Call(module, int(layer), query, key, value, attention_mask, scale, float(softcap or 0.0), s_aux)
    return _recorders[-1][0].attend(call), None


def mask(batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: Any = 0,
         mask_function: Callable[..., Any] | None = None, attention_mask: torch.Tensor | None = None,
         use_vmap: bool = False, device: Any = None, **others: Any) -> torch.Tensor:
    """transformers' mask signature: a tagged tensor of one element instead of a mask.

    Raises:
        UnsupportedModel: an argument is not understood.
    """
    for name, given in others.items():
        if name in MASK_WITHOUT_EFFECT or given is None or given is False:
            continue
        raise UnsupportedModel(f"the mask is made with `{name}`, of which gqa-export does not know whether it changes "
                               "the mask", type(others.get("config")).__name__,
                               "report this model and the version of transformers; its mask is not supported",
                               code="E-MODEL-MASK-ARGUMENT")
    return _tagged(MaskTag(mask_function, use_vmap, attention_mask), device)  # type: ignore[arg-type]


def _tagged(tag: MaskTag, device: Any) -> torch.Tensor:
    """The stand-in for a mask. Models cast theirs to their own type: this one stays what it is."""
    tagged: Any = torch.zeros(1, 1, 1, 1, device=device)
    tagged.gqa_mask = tag
    tagged.to = lambda *_, **__: tagged
    return tagged


def windowed(tagged: torch.Tensor | None, window: int) -> torch.Tensor | None:
    """The tagged mask narrowed to `window` tokens, the current one included (0: as it is), for patched models whose
    code narrows it beside the mask. A mask that is not tagged stays so, and is refused later."""
    tag = getattr(tagged, "gqa_mask", None)
    if tag is None or not window:
        return tagged

    def narrowed(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return tag.function(batch, head, query, key) & (key > query - window)

    return _tagged(MaskTag(narrowed, tag.use_vmap, tag.padding), tagged.device)  # type: ignore[union-attr]


def register() -> str:
    """Register both functions with transformers (idempotent) and return the implementation's name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    return NAME
