"""Writes gqa_export/trace/patches/source_digests.py: the digest of every function of transformers that a patch
replaces.

Run it after reading each function that changed (`git diff` of what it writes names them), and never to make an error
go away: the digest is the promise that somebody looked.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

HEAD = '''"""The source that each patch was written for: place -> start of its sha256. Written by
`scripts/patch_digests.py`, after every patched function was read."""

SEEN = {
'''


def main() -> None:
    """Read, hash, write."""
    from gqa_export.trace.patches import registry

    rows = {}
    for patch in registry.registry():
        if patch.path.endswith("]"):
            continue
        found = importlib.import_module(f"transformers.models.{patch.module}")
        for part in patch.path.split("."):
            found = inspect.getattr_static(found, part)
        rows[patch.place] = registry.digest(found)
    lines = [f'    "{place}": "{value}",\n' for place, value in sorted(rows.items())]
    Path(registry.__file__).with_name("source_digests.py").write_text(HEAD + "".join(lines) + "}\n")
    print(f"{len(rows)} places")


if __name__ == "__main__":
    main()
