"""PyTorch's side of a comparison, computed once for all bundles of a checkpoint: half of what `validate` costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from evidence.mutations.replayed_session import ReplayedSession

from gqa_export.bundle.manifest import Manifest
from gqa_export.validation.reference import Reference, open_reference

_opened: dict[tuple, Reference] = {}


def reference_of(checkpoint: Path, manifest: Manifest, ran_dtype: str = "float32") -> Reference:
    """The checkpoint opened as `validate` opens it for this bundle; what PyTorch says is kept, for the bundles of one
    checkpoint that follow one another."""
    key = (checkpoint, manifest.dtype, manifest.capacity, ran_dtype)
    if key not in _opened:
        _opened.clear()
        known = open_reference(checkpoint, manifest, ran_dtype, [])
        eager = None if known.eager is None else ReplayedSession(known.eager)
        _opened[key] = replace(known, session=ReplayedSession(known.session), eager=eager)
    return _opened[key]
