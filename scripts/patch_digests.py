"""Adds the installed transformers to gqa_export/trace/patches/source_digests.py: the digest of every function that a
patch replaces, beside those of other versions.

Run it after reading each function that changed (`git diff` of what it writes names them) and holding the patch
against it, and never to make an error go away: a digest is the promise that somebody looked. What only versions below
the bound in pyproject.toml have is taken out by hand.
"""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path

HEAD = '''"""The sources that each patch was held against: place -> starts of their sha256, as they were read.
Written by `scripts/patch_digests.py`, after every patched function was read."""

ABSENT = ""
"""the place does not exist in some version that was read, and that version needs no patch there"""
SEEN: dict[str, tuple[str, ...]] = {
'''


def main() -> None:
    """Read, hash, write."""
    from gqa_export.trace.patches import registry

    rows, new = {}, 0
    for patch in registry.registry():
        if patch.path.endswith("]"):
            continue
        found = importlib.import_module(f"transformers.models.{patch.module}")
        for part in patch.path.split("."):
            found = inspect.getattr_static(found, part, None)
        digest = registry.ABSENT if found is None else registry.digest(found)
        known = registry.SEEN.get(patch.place, ())
        new += digest not in known
        rows[patch.place] = (*known, *({digest} - set(known)))
    lines = []
    for place, known in sorted(rows.items()):
        digests = f"({', '.join(map(json.dumps, known))}{',' if len(known) == 1 else ''})"
        line = f'    "{place}": {digests},\n'
        lines.append(line if len(line) <= 121 else f'    "{place}":\n        {digests},\n')
    Path(registry.__file__).with_name("source_digests.py").write_text(HEAD + "".join(lines) + "}\n")
    print(f"{len(rows)} places, {new} of them with code that was not known")


if __name__ == "__main__":
    main()
