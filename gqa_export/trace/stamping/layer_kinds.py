"""Which layers must be traced: two of each kind. Kinds come from a fingerprint of every layer, not of the traced ones.

Two layers are of one kind if their code did the same when the probe ran it, their modules have the same classes,
attributes and parameter shapes, attention makes the same call there and they keep the same states. What a fingerprint
cannot see, the isomorphism proof in `stamp` and the final validation do.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...errors import GqaExportError
from ..probe.layer_code import CodeRecorder, LayerCode, layers_path
from ..probe.layer_probe import Probed, listen_with_cache
from . import module_attributes


@dataclass(frozen=True)
class Stack:
    """A model's decoder layers. path: dotted name of their ModuleList; kinds[i]: the kind of layer i.

    `traced` lists, in order, the first two layers of each kind.
    """

    path: str
    kinds: tuple[int, ...]
    traced: tuple[int, ...]

    def template(self, layer: int) -> int:
        """The traced layer that `layer` is a copy of (itself if it is traced)."""
        if layer in self.traced:
            return layer
        return [other for other in self.traced if self.kinds[other] == self.kinds[layer]][-1]


class NotAlike(Exception):
    """Depth cannot be stamped; the message says why."""


def plan(model: torch.nn.Module, probed: Probed) -> tuple[Stack, tuple[Any, ...]]:
    """The layers of a (meta-device) skeleton by kind, and the fingerprints that the model to be traced must have.

    The skeleton is shortened to the traced layers, to see that they still do the same. Raises NotAlike if not, and
    where there is nothing to gain or to be sure of.
    """
    stack = stack_of(model, probed)
    found = prints(model, stack)
    assert probed.code is not None
    keep_layers(model, stack)
    check_shortened(model, stack, probed.code)
    return stack, found


def stack_of(model: torch.nn.Module, probed: Probed) -> Stack:
    """The layers of a (meta-device) skeleton by kind. NotAlike where nothing is gained or anything is unsure."""
    spec, code = probed.spec, probed.code
    if len(spec.owners) < len(spec.layers):
        raise NotAlike("some layers read the keys and values of others")
    path = layers_path(model, None if spec.states else len(spec.layers))
    if path is None:
        raise NotAlike("no layers that are alike")
    if code is None or code.path != path or not code.in_order:
        raise NotAlike("the layers are not called one after the other")
    if len(set(code.between)) > 1:
        raise NotAlike("what is done between the layers depends on their number")
    layers = model.get_submodule(path)
    kinds_of = getattr(_text(model.config), "layer_types", None) or [None] * len(layers)  # type: ignore[arg-type]
    attentions = {layer.layer: replace(layer, layer=0) for layer in spec.layers}
    seen: dict[tuple[Any, ...], int] = {}
    kinds = []
    for place, (layer, named) in enumerate(zip(layers, kinds_of)):  # type: ignore[call-overload]
        if _computed(layer):
            raise NotAlike("the layers hold tensors that are in no checkpoint")
        states = tuple(replace(state, layer=0) for state in spec.states if state.layer == place)
        key = (named, attentions.get(place), states, code.layers[place], _fingerprint(layer),
               tuple(module_attributes.attributes(module) for module in layer.modules()))
        kinds.append(seen.setdefault(key, len(seen)))
    traced = tuple(sorted(i for kind in set(kinds) for i in [j for j, k in enumerate(kinds) if k == kind][:2]))
    if len(traced) == len(kinds):
        raise NotAlike("no layers that are alike")
    return Stack(path, tuple(kinds), traced)


def _computed(layer: torch.nn.Module) -> bool:
    """Whether a layer holds buffers or other tensors that no checkpoint has: they may differ from layer to layer, and
    their values are not known here. Those a checkpoint has (a router's correction) are weights like others."""
    stored = layer.state_dict()
    return any(name not in stored for name, _ in layer.named_buffers()) or any(
        True for module in layer.modules() for _ in module_attributes.tensors(module))


def check_shortened(model: torch.nn.Module, stack: Stack, code: LayerCode) -> None:
    """Run a skeleton that `keep_layers` shortened, without weights. Raises NotAlike unless each layer in it does what
    it does in the whole model, and so does all that is around them: code that counts layers takes others for them."""
    recorder = CodeRecorder(model, stack.path)
    try:
        listen_with_cache(model, recorder)
    except GqaExportError as reason:
        raise NotAlike(f"the model does not run with some of its layers alone: {reason.what}") from reason
    short = recorder.code
    same = (short.in_order and short.around == code.around and set(short.between) <= set(code.between)
            and all(short.layers[layer] == code.layers[layer] for layer in stack.traced))
    if not same:
        raise NotAlike("something in the model is computed from the number of layers")


def prints(model: torch.nn.Module, stack: Stack) -> tuple[Any, ...]:
    """Fingerprints of the traced layers and of all that is not a layer. Equal for a model of full depth and the short
    one that is traced, unless something in it was computed from the number of layers."""
    layers = dict(model.get_submodule(stack.path).named_children())
    return (_fingerprint(model, f"{stack.path}."), *(_fingerprint(layers[str(layer)]) for layer in stack.traced))


def _fingerprint(layer: torch.nn.Module, without: str = " ") -> tuple[Any, ...]:
    rows: list[tuple[Any, ...]] = []
    for name, module in layer.named_modules():
        if name.startswith(without):
            continue
        shapes = tuple((key, tuple(value.shape)) for key, value in (*module._parameters.items(),
                                                                    *module._buffers.items()) if value is not None)
        rows.append((name, type(module).__qualname__, module_attributes.scalars(module), shapes))
    return tuple(rows)


def shorten(config: Any, layers: int) -> Any:
    """A copy of a config with only its first `layers` layers; lists with one entry a layer are cut likewise."""
    config = copy.deepcopy(config)
    _pick(_text(config), range(layers))
    return config


def _text(config: Any) -> Any:
    """The part of a configuration that describes the decoder: a multimodal one has several."""
    return config.get_text_config()


def _pick(text: Any, layers: Sequence[int]) -> None:
    """Leave only these layers in a text configuration, in place."""
    full = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == full and name not in ("architectures", "eos_token_id"):
            setattr(text, name, type(value)(value[i] for i in layers))
    text.num_hidden_layers = len(layers)


def keep_layers(model: torch.nn.Module, stack: Stack) -> None:
    """Leave only the traced layers in a skeleton, each with the index it had."""
    layers = model.get_submodule(stack.path)
    if len(layers) == len(stack.traced):  # type: ignore[arg-type]
        return
    parent, _, leaf = stack.path.rpartition(".")
    kept = torch.nn.ModuleList().train(model.training)
    for layer in stack.traced:
        kept.add_module(str(layer), layers[layer])  # type: ignore[index]
    setattr(model.get_submodule(parent), leaf, kept)
    texts = [_text(model.config), _text(model.get_decoder().config)]  # type: ignore[operator]
    for text in {id(text): text for text in texts}.values():  # a decoder may hold a copy
        _pick(text, stack.traced)
