"""How the graph of a model whose layers share caches (Gemma 3n, Gemma 4) lets a layer without one read its owner's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..environment.onnxruntime_ops import DISTRIBUTIONS
from ..environment.packages import installed_version
from ..errors import UnsupportedModel
from ..targets import layers_label

if TYPE_CHECKING:
    from ..spec import ModelSpec
    from ..targets import Target


def shares_caches(spec: ModelSpec) -> bool:
    """Whether some layer reads another's cache."""
    return len(spec.owners) < len(spec.layers)


def reads_caches(spec: ModelSpec, target: Target, ragged_chunks: bool) -> bool:
    """Whether layers read their owner's present as it is. Where the installed onnxruntime is too old for that (or there
    is none), and with `--ragged-chunks`, which its operator refuses without new tokens, they add what their owner adds
    to its past once more, and the copy is dropped after the call."""
    if not target.shared_caches_need or not shares_caches(spec):
        return True
    if ragged_chunks:
        return False
    version = next((version for name in DISTRIBUTIONS if (version := installed_version(name))), "0")
    return _numbers(version) >= _numbers(target.shared_caches_need)


def first_version(spec: ModelSpec, target: Target, reads: bool) -> str:
    """The first onnxruntime that runs such a graph; "" where every one does that this package takes."""
    held = any(layer.owner is not None and not target.cannot_hold(layer) for layer in spec.layers)
    return target.shared_caches_need if reads and held else ""


def refuse_long_with_shared(spec: ModelSpec) -> None:
    """Refuse a graph for long prompts for a model whose layers share caches.

    Raises:
        UnsupportedModel: some do.
    """
    if shares_caches(spec):
        raise UnsupportedModel("approximate attention for long prompts was not run in layers that share a cache",
                               layers_label(layer.layer for layer in spec.layers if layer.owner is not None),
                               "leave out --long-attention", code="E-MODEL-LONG-SHARED")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
