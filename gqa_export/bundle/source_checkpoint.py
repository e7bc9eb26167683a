"""The checkpoint that a bundle was made from."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.open import open_checkpoint
from .manifest import Manifest


def open_for(manifest: Manifest, source: str | Path) -> Checkpoint:
    """Open a checkpoint to compare a bundle with: text only if the bundle was made so."""
    return open_checkpoint(source, text_only=bool(manifest.source.get("text_only")))
