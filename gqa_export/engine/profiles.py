"""The two optimization profiles of an engine: decode (one new token) and prefill (up to the longest prompt).

One profile over both serves neither well: TensorRT tunes for its middle. The capacity is literal in the graph.
"""

from __future__ import annotations

from ..bundle.engine_facts import DECODE, PREFILL, ProfileFacts
from ..bundle.manifest import Manifest
from ..errors import GqaExportError, InvalidBundle
from ..graph_io import BATCH, SEQUENCE

MOST_PROMPT = 4096
USUAL_PROMPT = 512


def make_profiles(manifest: Manifest, max_batch: int, max_prompt: int) -> tuple[ProfileFacts, ...]:
    """decode: S = 1; prefill: S = 1 .. max_prompt (0: the capacity, at most 4096, or, where windowed layers keep rings,
    the prompt chunk); both for 1 .. max_batch.

    A runtime cuts a longer prompt into pieces, which a longrope model would rotate by different tables: its engine
    takes the whole capacity at once.
    """
    switch, windows = manifest.spec.rope_switch, manifest.window_cache
    if windows is not None and max_prompt > windows.chunk:
        raise GqaExportError(f"prompts of {max_prompt} tokens at once are more than the prompt chunk of "
                             f"{windows.chunk} that the caches of windowed layers were made for", "--max-prompt",
                             f"use --max-prompt {windows.chunk} or less (longer prompts are fed in pieces), or export "
                             f"the bundle with --prompt-chunk {max_prompt}", code="E-ENGINE-PROMPT")
    if windows is not None:
        max_prompt = max_prompt or min(windows.chunk, MOST_PROMPT)
    longest = max_prompt or (manifest.capacity if switch else min(manifest.capacity, MOST_PROMPT))
    if switch and longest < manifest.capacity:
        raise GqaExportError(f"prompts of more than {longest} tokens would be fed in pieces, and a longrope model "
                             f"takes one of more than {switch} tokens at once", "--max-prompt",
                             f"leave --max-prompt out, or export the bundle with --capacity {switch} or less",
                             code="E-ENGINE-PROMPT-PIECES")
    if longest > manifest.capacity:
        raise GqaExportError(f"prompts of {longest} tokens do not fit the cache's capacity of {manifest.capacity}",
                             "--max-prompt", f"use --max-prompt {manifest.capacity} or less, or export the bundle with "
                             "a larger --capacity", code="E-ENGINE-PROMPT")
    usual = min(longest, USUAL_PROMPT)
    return (_profile(manifest, DECODE, max_batch, (1, 1, 1)),
            _profile(manifest, PREFILL, max_batch, (1, usual, longest)))


def _profile(manifest: Manifest, name: str, max_batch: int, steps: tuple[int, int, int]) -> ProfileFacts:
    shapes = {}
    for tensor in manifest.inputs:
        strange = [axis for axis in tensor.shape if isinstance(axis, str) and axis not in (BATCH, SEQUENCE)]
        if strange:
            raise InvalidBundle(f"the input {tensor.name} has an axis {strange[0]!r} whose size is not fixed",
                                "gqa_export.json", "export the bundle again with this version of gqa-export",
                                code="E-ENGINE-AXIS")
        sizes = []
        for batch, sequence in zip((1, 1, max_batch), steps, strict=True):
            known = {BATCH: batch, SEQUENCE: sequence}
            sizes.append(tuple(known[axis] if isinstance(axis, str) else axis for axis in tensor.shape))
        shapes[tensor.name] = (sizes[0], sizes[1], sizes[2])
    return ProfileFacts(name, shapes)
