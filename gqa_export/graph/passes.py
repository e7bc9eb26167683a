"""A pass and how a list of them is run: each counts what it rewrote, and a count that was not expected is an error.

A pass is `function(graph, context) -> int`. The graph is whatever its list works on (an onnx_ir Model or a
graphsurgeon Graph); the context is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import GqaExportError


@dataclass(frozen=True)
class Pass:
    """One rewriting step. `expect(context)` is the count it must report; None, or no `expect`: any count will do."""

    name: str
    function: Callable[[Any, Any], int]
    expect: Callable[[Any], int | None] | None = None


def run_passes(graph: Any, passes: Sequence[Pass], context: Any = None,
               counts: dict[str, int] | None = None) -> dict[str, int]:
    """Run `passes` over `graph` in order, in place; returns the count of each, added to `counts` if given.

    Raises GqaExportError when a pass rewrote another number of places than it expects: a rewriting that is
    missing in silence is a slow or a wrong model.
    """
    counts = {} if counts is None else counts
    for step in passes:
        earlier = dict(counts)
        count = step.function(graph, context)
        counts[step.name] = counts.get(step.name, 0) + count
        wanted = step.expect(context) if step.expect else None
        if wanted is not None and count != wanted:
            raise GqaExportError(f"{step.name} rewrote {count} nodes, expected {wanted}",
                                 f"graph {getattr(graph, 'name', None) or 'model'!r}, earlier passes {earlier}",
                                 "use --target portable, which needs no such pattern, and report this model")
    return counts
