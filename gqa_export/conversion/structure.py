"""The same architecture with fewer key/value heads: which fields of config.json set them, checked on the model.

Architectures name the number of key/value heads differently, or fix it. Each spelling that the configuration knows is
tried; the resulting model, without weights, must really make that many heads and differ from the source in nothing
else.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import GqaExportError, UnsupportedModel
from ..trace import attention_hook, skeleton
from ..trace.probe import layer_probe
from .head_layout_probe import layouts
from .layout import LayerLayout

FIX = "convert a checkpoint of an architecture whose config.json has num_key_value_heads"


@dataclass(frozen=True)
class Structure:
    """A configuration's model: its attention layers, and the shape of every parameter (meta device)."""

    config: Any
    layers: tuple[LayerLayout, ...]
    shapes: Mapping[str, tuple[int, ...]]
    prefix: str
    """what the names of the base model begin with when it has a head, "model.\""""

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """Key/value heads of each layer."""
        return tuple(len(layer.key.starts) for layer in self.layers)

    @property
    def query_heads(self) -> tuple[int, ...]:
        """Query heads of each layer."""
        return tuple(len(layer.query.starts) for layer in self.layers)


def structure_of(config: Any) -> Structure:
    """Build the model without weights and probe its attention.

    Raises:
        UnsupportedModel: layers keep states of fixed size, or keys and values cannot be pooled.
    """
    _refuse_states(config)
    model = skeleton.build(config, torch.float32, device="meta", attention=attention_hook.register())
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return Structure(config, layouts(model), shapes, f"{getattr(model, 'base_model_prefix', '')}.")


def _refuse_states(config: Any) -> None:
    """What such layers run cannot be followed from a weight to its head: they were never tried."""
    try:
        states = layer_probe.probe(config).states
    except GqaExportError:
        return  # not a model that can be exported; whether its heads can be pooled is another question
    if states:
        raise UnsupportedModel("the model has layers that keep a state of fixed size beside its attention layers, and "
                               "the heads of such models are not converted", f"{config.model_type}, layers "
                               f"{', '.join(map(str, sorted({state.layer for state in states})[:8]))}",
                               "export the checkpoint as it is", code="E-CONVERT-STATES")


def spellings(kv_heads: int | list[int], query_heads: int) -> list[dict[str, Any]]:
    """Every way in which a configuration may set the number of key/value heads."""
    ways: list[dict[str, Any]] = [{"num_key_value_heads": kv_heads},
                                  {"num_kv_heads": kv_heads, "new_decoder_architecture": True},
                                  {"num_kv_heads": kv_heads}]
    if kv_heads == 1:
        ways.append({"multi_query": True})
    if kv_heads == query_heads:
        ways.append({"multi_query": False})
    return ways


def with_kv_heads(source: Structure, kv_heads: Sequence[int]) -> tuple[Structure, dict[str, Any]]:
    """The structure with other numbers of key/value heads.

    Args:
        source: the model's structure.
        kv_heads: one number per layer.

    Returns:
        The new structure, and the fields of config.json that make it.

    Raises:
        UnsupportedModel: the architecture cannot have them, or has other weights that depend on their number.
    """
    wanted: int | list[int] = kv_heads[0] if len(set(kv_heads)) == 1 else list(kv_heads)
    known = source.config.to_dict()
    reasons = []
    for fields in spellings(wanted, source.query_heads[0]):
        if not set(fields) <= set(known):
            continue
        config = copy.deepcopy(source.config)
        try:
            for name, value in fields.items():
                setattr(config, name, value)
            made = structure_of(config)
        except GqaExportError:
            raise
        except Exception as error:  # whatever a configuration or a module makes of a value that it does not know
            reasons.append(f"{', '.join(fields)}: {type(error).__name__}")
            continue
        if made.kv_heads == tuple(kv_heads):
            _compare(source, made)
            return made, fields
        reasons.append(f"{', '.join(fields)} gives {sorted(set(made.kv_heads))}")
    tried = f" ({'; '.join(reasons)})" if reasons else ""
    if isinstance(wanted, list):
        raise UnsupportedModel(f"this architecture has one number of key/value heads for all its layers{tried}",
                               f"{source.config.model_type}, --kv-heads {','.join(map(str, wanted))}",
                               "give one number", code="E-CONVERT-PER-LAYER")
    raise UnsupportedModel(f"this architecture cannot have {wanted} key/value heads beside {source.query_heads[0]} "
                           f"query heads{tried}", source.config.model_type, FIX, code="E-CONVERT-KV-HEADS")


def _compare(source: Structure, made: Structure) -> None:
    """Refuse whatever besides keys and values depends on the number of heads."""
    may_change = {name for layer in source.layers for name in layer.parameters()}
    others = sorted({name for name in {*source.shapes, *made.shapes} - may_change
                     if source.shapes.get(name) != made.shapes.get(name)})
    if others:
        raise UnsupportedModel(f"{others[0]} depends on the number of key/value heads, and its mean is not defined",
                               others[0], "such weights (a norm with one weight per head, for example) cannot be "
                               "pooled; choose another checkpoint", code="E-CONVERT-OTHER-WEIGHTS")
    for old, new in zip(source.layers, made.layers, strict=True):
        same = (old.parameters(), old.key.size, old.value.size, old.pairs, len(old.query.starts), old.linear)
        if same != (new.parameters(), new.key.size, new.value.size, new.pairs, len(new.query.starts), new.linear):
            raise UnsupportedModel("with fewer key/value heads this architecture makes its heads in another way",
                                   f"layer {old.layer}, {old.path}", FIX, code="E-CONVERT-STRUCTURE")
