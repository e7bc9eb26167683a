"""Writes a verdict into a bundle's manifest: the one change that is made to a bundle after it was written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import GqaExportError, cause_of
from ..files.atomic_replace import move, remove_file, sync
from .manifest import MANIFEST, Manifest
from .recorded_verdict import RecordedVerdict


def record(folder: Path, manifest: Manifest, verdict: RecordedVerdict) -> Manifest:
    """Write a verdict into a bundle's manifest, in place of one that is there, and give the manifest.

    Raises:
        GqaExportError: the folder cannot be written.
    """
    known = replace(manifest, verdict=verdict)
    fresh = folder / f"{MANIFEST}.new"
    try:
        fresh.write_text(known.to_json(), encoding="utf-8")
        sync(fresh)
        move(fresh, folder / MANIFEST)
    except OSError as error:
        raise GqaExportError(f"the verdict cannot be recorded in the manifest: {cause_of(error)}", str(folder),
                             "make the folder writable", code="E-FILE-RECORD") from error
    finally:
        remove_file(fresh)
    return known
