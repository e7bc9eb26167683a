"""The checkpoint that a bundle was made from."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.open import open_checkpoint
from .manifest import Manifest


def open_for(manifest: Manifest, source: str | Path | Checkpoint, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint to compare a bundle with; one that is open already is given back.

    The language model alone is taken where the bundle was made so. revision: of a hub id; None is the commit that the
    bundle was made from, if its manifest names this very id, else the hub's main branch.
    """
    if isinstance(source, Checkpoint):
        return source
    made_from = manifest.source.get("checkpoint") == str(source) and not Path(source).exists()
    if revision is None and made_from:
        revision = str(manifest.source.get("revision") or "") or None
    return open_checkpoint(source, text_only=bool(manifest.source.get("text_only")), revision=revision)
