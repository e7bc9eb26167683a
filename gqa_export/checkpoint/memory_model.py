"""The module behind a checkpoint in memory, as a copy that a comparison may run."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint
from .quiet import quiet

if TYPE_CHECKING:
    import torch


def model_of(checkpoint: Checkpoint, dtype: str, config: Any, attn_implementation: str) -> torch.nn.Module:
    """A copy of a checkpoint's model in memory, on the CPU, in eval mode, with weights in `dtype`.

    In the model's own type it is a true copy, whatever a program did to it. In another type it is built anew from the
    configuration and filled with the weights: casting a module would round its rotary frequencies too.
    """
    import torch

    source: Any = checkpoint.model
    with quiet():
        if dtype == checkpoint.stored_dtype:
            made: Any = copy.deepcopy(source).to("cpu")
            made.set_attn_implementation(attn_implementation)
            if getattr(made, "_can_set_experts_implementation", lambda: False)():
                made.set_experts_implementation("batched_mm")
        else:
            state = {name: tensor.detach().to("cpu") for name, tensor in source.state_dict().items()}
            made = type(source).from_pretrained(None, config=config, state_dict=state, dtype=getattr(torch, dtype),
                                                attn_implementation=attn_implementation,
                                                experts_implementation="batched_mm")
    return made.eval()
