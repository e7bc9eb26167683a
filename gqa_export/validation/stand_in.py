"""A bundle beside a bundle: another graph over the same weights, for a comparison that must not change the bundle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.manifest import MANIFEST, MODEL, Manifest
from ..files.scratch import scratch_folder

if TYPE_CHECKING:
    import onnx


@contextmanager
def stand_in(folder: Path, manifest: Manifest, model: onnx.ModelProto, name: str) -> Iterator[tuple[Manifest, Path]]:
    """A folder with another graph and a bundle's weights, linked (copied where that fails).

    Args:
        folder, manifest: of the bundle.
        model: the graph in place of its own.
        name: of the scratch folder.
    """
    import onnx

    with scratch_folder(name) as place:
        for file in set(manifest.files) - {MODEL}:
            source, copy = (folder / file).resolve(), place / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, copy)
            except OSError:
                shutil.copy2(source, copy)  # with its time, which the manifest records
        onnx.save(model, str(place / MODEL))
        other = replace(manifest, files={file: fact for file, fact in manifest.files.items() if file != MODEL})
        (place / MANIFEST).write_text(other.to_json(), encoding="utf-8")
        yield other, place
