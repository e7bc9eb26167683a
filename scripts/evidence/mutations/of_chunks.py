"""The kinds of damage to attention in chunks of positions: an attribute `window` of -N is chunks of N."""

from __future__ import annotations

import onnx

from evidence.mutations.mutation import Broken, Mutation, NotHere


def _chunked(broken: Broken) -> onnx.AttributeProto:
    for layer in broken.manifest.spec.layers:
        if layer.chunk:
            return broken.attribute(broken.attention(layer.layer), "window")
    raise NotHere("chunks")


def chunk_longer(broken: Broken) -> None:
    """Every chunk has one position more."""
    _chunked(broken).i -= 1


def chunk_shorter(broken: Broken) -> None:
    """Every chunk has one position less."""
    _chunked(broken).i += 1


def chunk_dropped(broken: Broken) -> None:
    """Every token before is visible."""
    _chunked(broken).i = 0


def chunk_as_window(broken: Broken) -> None:
    """As many tokens as a chunk has are visible, wherever the chunk begins."""
    attribute = _chunked(broken)
    attribute.i = -attribute.i


CHUNK_MUTATIONS = (
    Mutation("chunk longer", "chunks off by one: one position more", chunk_longer, -1),
    Mutation("chunk shorter", "chunks off by one: one position less", chunk_shorter, -1),
    Mutation("chunk dropped", "attention in chunks read as causal", chunk_dropped, -1),
    Mutation("chunk as a window", "attention in chunks read as a sliding window", chunk_as_window, -1),
)
