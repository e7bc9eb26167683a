"""Per-layer facts from what each layer really passes to attention: one pass on the meta device, no weights.

The whole model is built without memory and run once on a few tokens. Each attention call gives head counts, sizes,
scale, softcap and sinks; the tag in its mask gives the window.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ...checkpoint.cache_argument import cache_argument
from ...checkpoint.decoder_layers import layer_lists
from ...checkpoint.refusals import state_module
from ...checkpoint.state_kernels import keeps_states
from ...errors import GqaExportError, UnsupportedModel, cause_of
from ...spec import DEFAULT_CAPACITY, AttentionSpec, ModelSpec, StateSpec
from .. import attention_hook, skeleton
from ..attention_hook import Call
from ..patches import registry
from ..states.observed import StateListener
from ..states.stand_in_cache import StandInCache, listening
from . import refused_code, rotary, text_masks
from .layer_code import CodeRecorder, LayerCode, layers_path
from .mask_window import Visible, visible_of

TOKENS = 8
LONGEST_GRID = 1 << 17
"""Masks are looked at up to this many positions; windows of known models are far below."""


@dataclass(frozen=True)
class Probed:
    """What one run of a model without weights shows: the facts of its attention layers, and what the code of its
    layers does (None where they are not items of one list)."""

    spec: ModelSpec
    code: LayerCode | None


class _Listener(StateListener):
    def __init__(self, recorder: CodeRecorder | None) -> None:
        super().__init__()
        self.calls: dict[int, Call] = {}
        self.recorder = recorder

    def note_step(self, name: str, *tensors: torch.Tensor | None) -> None:
        """See `StateListener`."""
        if self.recorder is not None:
            self.recorder.note(name, *tensors)

    def attend(self, call: Call) -> torch.Tensor:
        if call.layer in self.calls:
            raise UnsupportedModel("a layer calls attention more than once", f"layer {call.layer}",
                                   "such a model needs several key/value caches per layer, which is not supported",
                                   code="E-MODEL-ATTENTION-TWICE")
        self.calls[call.layer] = call
        if self.recorder is not None:
            self.recorder.note("attention", call.query, call.key, call.value, call.sinks)
        batch, heads, tokens, _ = call.query.shape
        return call.query.new_empty(batch, tokens, heads, call.value.shape[-1])


def probe(config: Any, model: torch.nn.Module | None = None, capacity: int = 0) -> ModelSpec:
    """The facts of every attention layer of a model, from one run without weights.

    Args:
        config: a transformers configuration.
        model: its skeleton with our attention and a settled rotary embedding (`rotary.settle`); None builds one on
            the meta device.
        capacity: tokens that the cache shall hold; 0 is all positions of the model, or DEFAULT_CAPACITY.

    Raises:
        UnsupportedModel: a layer is not grouped-query attention, a mask is not causal with a window, or a rotary type
            cannot be held by a fixed graph.
    """
    return _probe(config, model, capacity, record=False).spec


def probe_layers(config: Any, model: torch.nn.Module, capacity: int = 0) -> Probed:
    """As `probe`, with what the code of each layer does."""
    return _probe(config, model, capacity, record=True)


def _probe(config: Any, model: torch.nn.Module | None, capacity: int, record: bool) -> Probed:
    rotary.check_rope(config.get_text_config())
    with registry.applied(config):
        if model is None:
            model = skeleton.build(config, torch.float32, device="meta", attention=attention_hook.register())
            rotary.settle(model, TOKENS)
        path = layers_path(model) if record else None
        recorder = CodeRecorder(model, path) if path is not None else None
        calls, alike, states = listen_with_cache(model, recorder)
    if not calls and not states:
        raise _own_attention(model)
    text = config.get_text_config()
    positions = rotary.longest(text) or 2048
    masks: dict[int, Visible] = {}
    layers = []
    for layer, call in sorted(calls.items()):
        tag = getattr(call.mask, "gqa_mask", None)
        key = id(tag.function) if tag is not None else -layer - 1
        if key not in masks:
            found = visible_of(tag, layer, min(positions, LONGEST_GRID), call.query.shape[1],
                               capacity or min(positions, DEFAULT_CAPACITY))
            # where the cache ends within the first chunk, attention in chunks is plainly causal
            masks[key] = found if not capacity or found.chunk < capacity else Visible()
        layers.append(_layer_spec(call, masks[key], layer in alike, owner_of(call, calls)))
    _refuse_mixed(layers)
    _refuse_silent(model, set(calls) | {state.layer for state in states},
                   int(getattr(text, "num_hidden_layers", len(layers))), bool(states))
    spec = ModelSpec(model_type=config.model_type, architecture=type(model).__name__, vocabulary=text.vocab_size,
                     hidden_size=text.hidden_size, max_positions=positions,
                     rope="+".join(rotary.rope_types(text)), layers=tuple(layers), states=states)
    return Probed(spec, recorder.code if recorder is not None else None)


def _refuse_mixed(layers: list[AttentionSpec]) -> None:
    """Refuse a layer with a cache after one that reads another's: caches are compared in the order of their layers, and
    PyTorch's hold those of the first layers."""
    reader = next((layer for layer in layers if layer.owner is not None), None)
    late = next((layer for layer in layers if reader and layer.layer > reader.layer and layer.owner is None), None)
    if reader and late:
        raise UnsupportedModel(f"layer {reader.layer} reads the keys and values of layer {reader.owner}, and layer "
                               f"{late.layer} after it has its own", f"layer {late.layer}",
                               "layers that read another's must come after all that have their own, as in Gemma 3n; "
                               "other orders are not supported", code="E-MODEL-SHARED-ORDER")


def _refuse_silent(model: torch.nn.Module, heard: set[int], expected: int, states: bool) -> None:
    """Refuse layers that called neither attention nor a kernel function. Beside layers with states, those of nothing
    but a feed-forward part are known (`mlp`, `moe`): no module of theirs looks at other tokens."""
    silent = sorted(set(range(expected)) - heard)
    if states:
        found = next((layers for _, layers in layer_lists(model, expected)), ())
        silent = [layer for layer in silent if layer >= len(found) or state_module(found[layer])]
    if silent:
        raise UnsupportedModel("some layers are not grouped-query attention (they never call attention)",
                               f"{type(model).__name__}, layers {', '.join(map(str, silent[:8]))}",
                               "what these layers keep between steps is in the model's own code, which gqa-export "
                               "cannot see; they are not supported", code="E-MODEL-LAYERS-WITHOUT-CALL")


def listen_with_cache(model: torch.nn.Module, recorder: CodeRecorder | None = None) -> tuple[
        dict[int, Call], set[int], tuple[StateSpec, ...]]:
    """The attention calls of one run by layer, the layers whose keys and values PyTorch's own cache holds in the
    form that attention gets them, and the states of fixed size.

    Others cache latents (expanded after the cache) or read another layer's entry. Where the model cannot be run with
    a cache on this device, all are taken to be alike: a difference then shows when caches are compared. recorder: is
    told of every operation.
    """
    from transformers import DynamicCache

    if keeps_states(model.config):
        stand_in = StandInCache(listener := _Listener(recorder))
        with listening(stand_in):
            calls = listen(model, True, recorder, {cache_argument(model): stand_in}, listener)
        stand_in.finish()
        stored = stand_in.stored
        return calls, {layer for layer, call in calls.items() if layer in stored and all(
            one.shape == seen.shape for one, seen in zip(stored[layer], (call.key, call.value)))}, listener.found()
    cache = DynamicCache()
    try:
        calls = listen(model, True, recorder, {cache_argument(model): cache})
    except GqaExportError:
        calls = listen(model, recorder=recorder)
        return calls, set(calls), ()
    alike = set()
    for layer, call in calls.items():
        entry = cache.layers[layer] if layer < len(cache.layers) else None
        pair = (getattr(entry, "keys", None), getattr(entry, "values", None))
        if all(one is not None and one.shape == seen.shape for one, seen in zip(pair, (call.key, call.value))):
            alike.add(layer)
    return calls, alike, ()


def listen(model: torch.nn.Module, use_cache: bool = False, recorder: CodeRecorder | None = None,
           cache: Mapping[str, Any] | None = None, listener: _Listener | None = None) -> dict[int, Call]:
    """Run a model once on a few tokens.

    Args:
        model: with our attention, on any device, "meta" included.
        use_cache: as the model's own argument.
        recorder: is told of every operation.
        cache: further arguments of the model, such as past_key_values.
        listener: takes the calls; None makes one.

    Returns:
        Its attention calls by layer.

    Raises:
        UnsupportedModel: the model does not run as a decoder, or what its attention calls are refused for.
    """
    listener = listener or _Listener(recorder)
    recording = recorder.recording() if recorder is not None else nullcontext()
    device = next(model.parameters()).device
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device=device)
    positions = torch.arange(TOKENS, device=device)[None]
    masks = text_masks.of_text(model.config)
    with attention_hook.recording(listener, positions), torch.no_grad(), masks, recording:
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions,
                  use_cache=use_cache, **(cache or {}))
        except GqaExportError:
            raise
        except Exception as error:
            if isinstance(error, NotImplementedError) or "meta tensor" in str(error):
                raise UnsupportedModel("the model's code looks at values while it runs, which a fixed graph cannot "
                                       f"hold: {refused_code.statement(error)}", type(model).__name__,
                                       "not supported; models whose experts go through transformers' experts "
                                       "interface are", code="E-MODEL-DATA-DEPENDENT") from error
            if "on device meta" in str(error) and not listener.calls and not getattr(
                    model, "_supports_attention_backend", False):
                raise _own_attention(model) from error  # its own code mixes devices, and stops before the end
            raise UnsupportedModel(f"the model does not run as a decoder: {cause_of(error)}", type(model).__name__,
                                   "only decoder language models that take input_ids, attention_mask and position_ids "
                                   "are supported", code="E-MODEL-NOT-A-DECODER") from error
    return listener.calls


def _own_attention(model: torch.nn.Module) -> UnsupportedModel:
    depth = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))  # type: ignore[operator, union-attr]
    _, layers = next(layer_lists(model, depth), ("", ()))
    if layers and not any(map(state_module, layers)):
        return UnsupportedModel("no layer of this model has attention, or a state that it keeps: what it makes of a "
                                "token does not depend on those before", type(model).__name__,
                                "gqa-export takes decoders in which some layer looks back; check the kinds of layers "
                                "in config.json (layer_types)", code="E-MODEL-NO-ATTENTION")
    return UnsupportedModel("no layer of this model calls transformers' attention interface"
                            f"{refused_code.own_attention(model)}", type(model).__name__,
                            "what its own code does with keys and values, gqa-export cannot see; it is not supported",
                            code="E-MODEL-OWN-ATTENTION")


MIXING = frozenset({"Conv", "ConvTranspose", "CumSum", "Scan", "Loop", "LSTM", "GRU", "RNN"})
"""Ops that look along the sequence: between cached steps they would need a state of their own."""


def refuse_mixing(model: Any) -> None:
    """Refuse a canonical model in which something beside attention mixes tokens (it would be wrong when cached)."""
    for node in model.graph.node:
        if node.op_type in MIXING:
            raise UnsupportedModel(f"the model mixes tokens outside attention ({node.op_type})", node.name,
                                   "such a layer has a state beside the key/value cache; it is not supported",
                                   code="E-MODEL-MIXES-TOKENS")


def owner_of(call: Call, calls: Mapping[int, Call]) -> int | None:
    """The first layer before a call's own that attends to the very same keys and values: not equal ones, the same
    tensors. What a layer is given at every step, it has at every step; so its cache would be that layer's."""
    return next((layer for layer, other in sorted(calls.items()) if layer < call.layer
                 and other.key is call.key and other.value is call.value), None)


def _layer_spec(call: Call, visible: Visible, alike: bool, owner: int | None) -> AttentionSpec:
    _, num_heads, _, head_size = call.query.shape
    _, kv_num_heads, _, value_head_size = call.value.shape
    if num_heads % call.key.shape[1] or call.key.shape[1] != kv_num_heads or call.key.shape[3] != head_size:
        raise UnsupportedModel(f"query {tuple(call.query.shape)}, key {tuple(call.key.shape)} and value "
                               f"{tuple(call.value.shape)} are not grouped-query attention", f"layer {call.layer}",
                               "the number of query heads must be a multiple of the key/value heads; not supported",
                               code="E-MODEL-HEADS")
    return AttentionSpec(call.layer, num_heads, kv_num_heads, head_size, value_head_size, call.scale, call.softcap,
                         visible.window, call.sinks is not None, alike, visible.chunk, owner)
