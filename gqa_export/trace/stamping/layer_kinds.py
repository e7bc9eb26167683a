"""Which layers must be traced: two of each kind. Kinds come from a fingerprint of every layer, not of the traced ones.

Two layers are of one kind if their modules have the same classes, scalars and parameter shapes, and attention makes
the same call there. What a fingerprint cannot see, the isomorphism proof in `stamp` and the final validation do.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...checkpoint.decoder_layers import layer_lists
from ...spec import ModelSpec

_SCALARS = (bool, int, float, str, type(None), torch.dtype)
_PLACE = ("layer_idx", "layer_id", "layer_number")


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


def stack_of(model: torch.nn.Module, spec: ModelSpec) -> Stack | None:
    """The layers of a (meta-device) skeleton by kind, or None where there is nothing to gain or to be sure of."""
    path = _layers_path(model, spec)
    if path is None:
        return None
    layers = model.get_submodule(path)
    kinds_of = getattr(_text(model.config), "layer_types", None) or [None] * len(spec.layers)
    seen: dict[tuple[Any, ...], int] = {}
    kinds = []
    for layer, attention, named in zip(layers, spec.layers, kinds_of):  # type: ignore[call-overload]
        if _computed(layer):
            return None
        key = (named, replace(attention, layer=0), _fingerprint(layer))
        kinds.append(seen.setdefault(key, len(seen)))
    traced = tuple(sorted(i for kind in set(kinds) for i in [j for j, k in enumerate(kinds) if k == kind][:2]))
    if len(traced) == len(kinds):
        return None
    return Stack(path, tuple(kinds), traced)


def _computed(layer: torch.nn.Module) -> bool:
    """Whether a layer holds buffers that no checkpoint has: they may differ from layer to layer, and their values
    are not known here. Those a checkpoint has (a router's correction) are weights like others."""
    stored = layer.state_dict()
    return any(name not in stored for name, _ in layer.named_buffers())


def _layers_path(model: torch.nn.Module, spec: ModelSpec) -> str | None:
    """The ModuleList whose item i makes attention call i, for all i; None if there is not one."""
    for name, layers in layer_lists(model, len(spec.layers)):
        indices = [{sub.layer_idx for sub in layer.modules() if isinstance(getattr(sub, "layer_idx", None), int)}
                   for layer in layers]
        if indices == [{i} for i in range(len(layers))]:
            return name
    return None


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
        scalars = tuple(sorted((key, repr(value)) for key, value in vars(module).items()
                               if isinstance(value, _SCALARS) and key not in _PLACE and not key.startswith("_")))
        shapes = tuple((key, tuple(value.shape)) for key, value in (*module._parameters.items(),
                                                                    *module._buffers.items()) if value is not None)
        rows.append((name, type(module).__qualname__, scalars, shapes))
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
