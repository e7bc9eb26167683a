"""Whether weights that a configuration ties are one: the stored tensors decide, as they do in transformers.

`from_pretrained` does not tie two tensors that a checkpoint stores with different values, whatever config.json says
(transformers, `PreTrainedModel.tie_weights`).
"""

from __future__ import annotations

from typing import Any

from .checkpoint import Checkpoint
from .pickle_weights import read_pickles
from .same_weights import differ


def stored_apart(checkpoint: Checkpoint, group: tuple[str, ...]) -> bool:
    """Whether the checkpoint stores tensors of different values under these names, of which it may lack some.

    Values are compared as they are stored: a head that equals the embedding only after rounding is another head.
    """
    there: list[Any] = [checkpoint.tensors[name] for name in group if name in checkpoint.tensors]
    if checkpoint.model is not None or checkpoint.pickles:
        state = checkpoint.model.state_dict() if checkpoint.model is not None else read_pickles(checkpoint.pickles)
        there = [state[name] for name in group if name in state]
    return any(differ(there[0], other) for other in there[1:])
