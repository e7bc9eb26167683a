"""Position embeddings counted from the length of a cache object: they get each row's own positions instead.

Source: the `...PositionalEmbedding` classes of encoder-decoder families, whose decoders run alone as causal language
models. All of them look up position + offset in a table (learned or sinusoidal) that is their weight.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import attention_hook
from .registry import Patch

WHY = "positions are counted from the cache object's length, which is one number for all rows of a batch"


def _make(_original: Any, _module: Any) -> Any:
    def forward(self: Any, *_: Any, **__: Any) -> torch.Tensor:
        return torch.nn.functional.embedding(attention_hook.positions() + getattr(self, "offset", 0), self.weight)

    return forward


PATCHES = tuple(Patch(f"{module}.modeling_{module}", f"{name}.forward", _make, WHY) for module, name in (
    ("bart", "BartLearnedPositionalEmbedding"),
    ("bigbird_pegasus", "BigBirdPegasusLearnedPositionalEmbedding"),
    ("blenderbot", "BlenderbotLearnedPositionalEmbedding"),
    ("blenderbot_small", "BlenderbotSmallLearnedPositionalEmbedding"),
    ("marian", "MarianSinusoidalPositionalEmbedding"),
    ("mbart", "MBartLearnedPositionalEmbedding"),
    ("mvp", "MvpLearnedPositionalEmbedding"),
    ("pegasus", "PegasusSinusoidalPositionalEmbedding"),
    ("plbart", "PLBartLearnedPositionalEmbedding"),
    ("trocr", "TrOCRLearnedPositionalEmbedding"),
    ("whisper", "WhisperPositionalEmbedding"),
))
