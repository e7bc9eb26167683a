"""What a checkpoint's stored tensors decide about its model: whether a head is tied. Conversion, training and bisection
decide as an export does. Which tensors belong to the model at all is told by `unused_tensors`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .building import building
from .checkpoint import Checkpoint
from .load_config import load_config
from .quiet import quiet
from .tied_weights import refuse_tied, stored_apart, tied, untie

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Decided:
    """config: of transformers, untied where a head of its own is stored. untied: whether that was changed."""

    config: Any
    untied: bool


def decided_by_weights(checkpoint: Checkpoint) -> Decided:
    """The model that the stored tensors are of.

    Raises:
        UnsupportedModel: transformers cannot build the model, or it ties tensors that are stored with different values.
    """
    config = load_config(checkpoint)
    groups = tied(_without_weights(config))
    untied = any(stored_apart(checkpoint, group) for group in groups)
    if untied:
        untie(config)
        refuse_tied(checkpoint, tied(_without_weights(config)))
    return Decided(config, untied)


def _without_weights(config: Any) -> torch.nn.Module:
    import torch
    from transformers import AutoModelForCausalLM

    with quiet(), torch.device("meta"), building(config):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.tie_weights()  # type: ignore[operator]
    return model
