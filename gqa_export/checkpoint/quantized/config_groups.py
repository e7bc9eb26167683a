"""Which of a description's groups of layers a module belongs to: `config_groups` of compressed-tensors.

A group's targets are names of modules, regular expressions ("re:...", from the start of a name) and names of classes;
a name goes before an expression, and that before a class.
Source: `utils/match.py` and `quantization/lifecycle/apply.py` of https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

import re
from math import prod
from typing import Any

from .description import Description, whole_number
from .patterns import matches

EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)$")
KNOWN_CLASSES = ("Linear", "Embedding")
Groups = dict[str, dict[str, Any]]
"""name of a group -> its entry"""


def groups_of(description: Description, module: str) -> Groups:
    """The groups that a module may belong to, of those that quantize weights. More than one: its class is not known,
    or none has it (a checkpoint's names may be others than the description's), and its tensors have to tell.

    Raises:
        ValueError: a target is not a regular expression.
    """
    entries = description.fields.get("config_groups")
    groups = {str(name): entry for name, entry in entries.items() if isinstance(entry, dict) and isinstance(
        entry.get("weights"), dict)} if isinstance(entries, dict) else {}
    targets = {name: _texts(entry.get("targets")) for name, entry in groups.items()}
    own = [name for name, each in targets.items() if module in each] or [
        name for name, each in targets.items() if any(
            target.startswith("re:") and matches(target.removeprefix("re:"), module) for target in each)]
    if not own:
        likely = "Embedding" if EMBEDDING.search(module) else "Linear"
        own = [name for name, each in targets.items() if any(
            target == likely or (target[:1].isupper() and "." not in target and target not in KNOWN_CLASSES)
            for target in each)]
    return {name: groups[name] for name in own or groups}


def blocks_that_fit(schemes: list[dict[str, Any]], shape: tuple[int, ...], scales: tuple[int, ...]) -> list[
        tuple[int, int]]:
    """(rows, columns) that share a scale, by each scheme that gives scales of this shape; each once.

    Args:
        schemes: of weights.
        shape: of the weight, `[..., N, K]`.
        scales: shape of its scales.

    Raises:
        ValueError: a size is not a whole number.
    """
    rows, columns, found = prod(shape[:-1]), shape[-1], list[tuple[int, int]]()
    for scheme in schemes or [{}]:
        rectangle, group = rectangle_of(scheme), whole_number("group_size", scheme.get("group_size")) or -1
        if rectangle is not None:
            expected = (*shape[:-2], -(-shape[-2] // rectangle[0]), -(-columns // rectangle[1]))
            fits = [size for size in scales if size != 1] == [size for size in expected if size != 1]
            block = min(rectangle[0], shape[-2]), min(rectangle[1], columns)
        elif group > 0:
            fits, block = scales == (*shape[:-1], -(-columns // group)), (1, min(group, columns))
        else:
            one = prod(scales) == 1
            fits, block = one or scales in ((rows,), (*shape[:-1], 1)), (rows if one else 1, columns)
        if fits and block not in found:
            found.append(block)
    return found


def rectangle_of(scheme: dict[str, Any]) -> tuple[int, int] | None:
    """The rows and columns of a scheme's blocks, [128, 128] or "128x128"; None if it has none.

    Raises:
        ValueError: it is neither.
    """
    told = scheme.get("block_structure")
    if told is None:
        return None
    sizes = told.lower().split("x") if isinstance(told, str) else told
    if isinstance(sizes, list) and len(sizes) == 2:
        high, wide = (whole_number("block_structure", size) or 0 for size in sizes)
        if high > 0 and wide > 0:
            return high, wide
    raise ValueError(f"block_structure is {told!r}, expected two sizes above zero")


def _texts(found: object) -> list[str]:
    return [found] if isinstance(found, str) else [each for each in found if isinstance(each, str)] if isinstance(
        found, list) else []
