"""A pass and how a list of them is run: each counts what it rewrote, and a count that was not expected is an error.

A pass is `function(graph, context) -> int | Rewritten`. The graph is whatever its list works on (an onnx ModelProto,
an onnx_ir Model or a graphsurgeon Graph); the context is the caller's. A place that nearly fits a pass's pattern is a
`NearMiss`: which node, and which condition does not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from ..errors import GqaExportError, UnsupportedModel

Graph = TypeVar("Graph")
Context = TypeVar("Context")

FIX = "--dump-passes DIR, use --target portable, which needs no such pattern, and report this model"
SHOWN = 6
"""near misses that a message lists; the others are counted"""


@dataclass(frozen=True)
class NearMiss:
    """A place that a pass looked at and left as it was.

    Attributes:
        node: name of the node at which the pattern breaks off.
        reason: the condition that does not hold there.
        step: name of the pass; `run_passes` fills it in.
    """

    node: str
    reason: str
    step: str = ""

    def __str__(self) -> str:
        return f"node {self.node!r}: {self.reason}"


@dataclass(frozen=True)
class Rewritten:
    """What a pass did: how many places it rewrote, and which others nearly fitted."""

    count: int
    near_misses: tuple[NearMiss, ...] = ()


@dataclass(frozen=True)
class Pass(Generic[Graph, Context]):
    """One rewriting step.

    Attributes:
        name: as it appears in counts, messages and dumps.
        function: rewrites the graph in place and counts.
        expect: the count that it must report, from the context; None, or no `expect`: any count will do.
        requires: names of the passes that must have run before.
        ensures: gives the places where the graph is not what the pass leaves behind: run after it, and any place is
            an error. None: nothing is promised (a fusion may match nowhere).
    """

    name: str
    function: Callable[[Graph, Context], int | Rewritten]
    expect: Callable[[Context], int | None] | None = None
    requires: tuple[str, ...] = ()
    ensures: Callable[[Graph, Context], Iterable[NearMiss]] | None = None


@dataclass(frozen=True)
class PassRun:
    """What is known of a pass that has just run. expected: None where any count will do."""

    name: str
    count: int
    expected: int | None
    near_misses: tuple[NearMiss, ...]


@dataclass
class PassLog:
    """What passes did so far, over one or several lists.

    Attributes:
        counts: by pass, in the order in which they ran.
        near_misses: of all passes.
        watch: called with each run and the graph after it, before its count is checked.
    """

    counts: dict[str, int] = field(default_factory=dict)
    near_misses: list[NearMiss] = field(default_factory=list)
    watch: Callable[[PassRun, object], None] | None = None


def run_passes(graph: Graph, passes: Sequence[Pass[Graph, Context]], context: Context,
               log: PassLog | None = None) -> PassLog:
    """Run `passes` over `graph` in order, in place.

    Args:
        graph: what the passes rewrite.
        passes: the list.
        context: what they share.
        log: of the lists that ran before; a new one if it is left out.

    Returns:
        The log, with the counts and near misses of these passes added.

    Raises:
        GqaExportError: the list has a pass before one that it requires; nothing has run then.
        UnsupportedModel: a pass rewrote another number of places than it expects, or its promise does not hold: a
            rewriting that is missing in silence is a slow or a wrong model.
    """
    log = PassLog() if log is None else log
    check_order(passes, log.counts)
    for step in passes:
        earlier = dict(log.counts)
        done = step.function(graph, context)
        done = Rewritten(done) if isinstance(done, int) else done
        misses = tuple(replace(miss, step=step.name) for miss in done.near_misses)
        expected = step.expect(context) if step.expect else None
        log.counts[step.name] = log.counts.get(step.name, 0) + done.count
        log.near_misses.extend(misses)
        if log.watch:
            log.watch(PassRun(step.name, done.count, expected, misses), graph)
        where = f"graph {getattr(graph, 'name', None) or 'model'!r}, earlier passes {earlier}"
        if expected is not None and done.count != expected:
            raise UnsupportedModel(f"{step.name} rewrote {done.count} nodes, expected {expected}{_listed(misses)}",
                                   where, f"see the graph before and after {step.name} with {FIX}",
                                   code="E-GRAPH-PASS-COUNT")
        broken = tuple(step.ensures(graph, context)) if step.ensures else ()
        if broken:
            raise UnsupportedModel(f"{step.name} left {len(broken)} nodes unfinished{_listed(broken)}", where,
                                   f"see the graph after {step.name} with {FIX}", code="E-GRAPH-PASS-PROMISE")
    return log


def check_order(passes: Sequence[Pass[Graph, Context]], ran: Iterable[str] = ()) -> None:
    """Refuse a list in which a pass comes before one that it requires. ran: names of passes that ran earlier."""
    known = set(ran)
    for step in passes:
        missing = [name for name in step.requires if name not in known]
        if missing:
            raise GqaExportError(f"pass {step.name} requires {', '.join(missing)} before it",
                                 f"passes {[each.name for each in passes]}", "change the order of the list",
                                 code="E-GRAPH-PASS-ORDER")
        known.add(step.name)


def _listed(misses: Sequence[NearMiss]) -> str:
    lines = ["", *(str(miss) for miss in misses[:SHOWN])]
    if len(misses) > SHOWN:
        lines.append(f"and {len(misses) - SHOWN} more")
    return "; ".join(lines)
