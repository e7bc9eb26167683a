"""Drives one case through Polygraphy's Comparator, step by step, and keeps what was measured.

`CaseDriver.feeds` is the Comparator's data loader, `CaseDriver.compare` its comparison function. Both look at the
same state: the loader makes the next step only after the last one was compared, so it can feed the
reference's own greedy tokens, and go on with them where a free run parted. Nothing of a step's arrays is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .cases import Case
from .error_trace import Surroundings, surroundings
from .logits import LogitTally
from .metrics import Difference, difference, last_rows, margin

REFERENCE, EAGER, BUNDLE = "reference", "eager", "bundle"
"""names of the runners: PyTorch in fp64, PyTorch in the bundle's number format (the same-dtype baseline), the bundle"""


@dataclass(frozen=True)
class Measured:
    """One output of one step. `token`: absolute position of the first token of that step, per row."""

    step: int
    phase: str
    output: str
    difference: Difference
    tokens: tuple[int, ...]

    def __bool__(self) -> bool:
        return self.difference.nonfinite == 0


@dataclass(frozen=True)
class Choice:
    """A row whose best token differs. margin: how much the reference prefers its own."""

    step: int
    row: int
    expected: int
    got: int
    margin: float


@dataclass
class CodeShare:
    """Codes of one case. apart: of the bundle, not nearest to the reference's numbers. own: the same of PyTorch in the
    number format that is run. total: all that were looked at."""

    apart: int = 0
    own: int = 0
    total: int = 0


@dataclass
class CaseLog:
    """What a case gave. bundle: every output of every step in the order of computation. baseline: per output, the
    largest error of PyTorch in the bundle's format (the same-dtype baseline); None where it was not run. eager_logits:
    largest difference of the bundle's logits to PyTorch in the bundle's format. worst: per output, the surroundings of
    its largest gap. codes: of a quantized cache, those that are not the reference's; None where they were not
    counted. by_rule: as `bundle`, but against PyTorch in the bundle's format, which rounds by the same rule; empty
    where nothing is rounded. best_by_rule: (step, row) -> PyTorch's best token then."""

    case: Case
    tally: LogitTally = field(default_factory=LogitTally)
    bundle: list[Measured] = field(default_factory=list)
    worst: dict[str, Surroundings] = field(default_factory=dict)
    baseline: dict[str, float] | None = None
    eager_logits: float | None = None
    rows: int = 0
    agreed: int = 0
    choices: list[Choice] = field(default_factory=list)
    parted: int | None = None
    codes: CodeShare | None = None
    seconds: float = 0.0
    by_rule: list[Measured] = field(default_factory=list)
    best_by_rule: dict[tuple[int, int], int] = field(default_factory=dict)


def quantity(output: str) -> str:
    """The output whose tolerance applies: a cache at the end is made of the rows that the steps wrote."""
    return output.replace("cache.", "layer.", 1)


class CaseDriver:
    """State of one case while it runs. Feeds, all int64: input_ids [B, S], new_lengths [B], flags [3]: 1 for a
    new batch, 1 to feed your own best token instead, 1 to show the whole cache too. rounded: PyTorch in the bundle's
    format rounds by the bundle's rule, and every output is compared with its too."""

    def __init__(self, case: Case, filler: np.ndarray, tick: Callable[[], None] = lambda: None,
                 rounded: bool = False) -> None:
        self.case, self.log, self.filler, self.tick, self.rounded = case, CaseLog(case), filler, tick, rounded
        self.step, self.phase, self.free = 0, "prefill", False
        self.new_lengths = np.zeros(case.batch, np.int64)
        self.lengths = np.zeros(case.batch, np.int64)
        self.next_tokens = np.zeros(case.batch, np.int64)
        self._most: dict[str, float] = {}
        self._block = np.zeros((case.batch, 1), np.int64)
        self._shown: list[dict[str, Any]] = []

    def feeds(self) -> Iterator[dict[str, np.ndarray]]:
        """All feeds of the case, each made when the one before was compared."""
        schedule = self._prompt() + [None] * len(self.case.counts)
        for step, ids in enumerate(schedule):
            after_prompt = step - (len(schedule) - len(self.case.counts))
            if ids is None:
                self.phase = "decode"
                self.new_lengths = np.array(self.case.counts[after_prompt], np.int64)
                block = self._tokens()
                self.free = self.case.free and self.log.parted is None
            else:
                self.new_lengths, block = ids
            self.step, self._block = step, block
            yield {
                "input_ids": block, "new_lengths": self.new_lengths,
                "flags": np.array([step == 0, self.free, step == len(schedule) - 1], np.int64),
            }
            for arrays in self._shown:
                arrays.clear()  # the Comparator would hold a step's arrays until the next one is there
            self._shown = []
            self.lengths = self.lengths + self.new_lengths
            self.tick()

    def _prompt(self) -> list[Any]:
        """(new_lengths [B], ids [B, S]) of each piece of the prompt, right-padded with token 0."""
        longest, pieces = max(len(p) for p in self.case.prompts), []
        for start in range(0, longest, self.case.chunk):
            rows = [prompt[start: start + self.case.chunk] for prompt in self.case.prompts]
            lengths = np.array([len(row) for row in rows], np.int64)
            ids = np.zeros((len(rows), int(lengths.max())), np.int64)
            for row, tokens in enumerate(rows):
                ids[row, : len(tokens)] = tokens
            pieces.append((lengths, ids))
        return pieces

    def _tokens(self) -> np.ndarray:
        """The reference's greedy token of every row; rows that bring more tokens take them from the filler."""
        ids = np.zeros((self.case.batch, max(1, int(self.new_lengths.max()))), np.int64)
        for row, count in enumerate(self.new_lengths):
            ids[row, :count] = np.resize(np.roll(self.filler, self.step + row), count)
            if count:
                ids[row, 0] = self.next_tokens[row]
        return ids

    def compare(self, reference: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> OrderedDict[str, Any]:
        """Measure one runner against another. Polygraphy calls this for every pair at every step."""
        self._shown += [side.dct for side in (reference, other) if hasattr(side, "dct")]
        pair = (reference.runner_name, other.runner_name)  # type: ignore[attr-defined]
        if pair == (EAGER, BUNDLE):
            found = difference(reference["logits"], other["logits"]).max_abs
            self.log.eager_logits = max(self.log.eager_logits or 0.0, found)
            if self.rounded:
                self._follow(reference, other)
            return OrderedDict()
        if pair == (REFERENCE, EAGER):
            baseline = self.log.baseline = self.log.baseline or {}
            for name in reference:
                if name != "fed":
                    found = difference(reference[name], other[name]).max_abs
                    baseline[quantity(name)] = max(baseline.get(quantity(name), 0.0), found)
            return OrderedDict()
        self._choose(reference["logits"], other["logits"])
        self._tally(reference["logits"], other["logits"])
        results: OrderedDict[str, Measured] = OrderedDict()
        for name in reference:
            if name == "fed":
                if not np.array_equal(reference[name], other[name]):
                    raise RuntimeError("the reference and the bundle were fed different tokens")
                continue
            one = self._measured(name, reference, other)
            # a name of our own: Polygraphy takes statistics of whole arrays for names it knows
            results[f"difference of {name}"] = one
            if one.difference.max_abs > self._most.get(name, 0.0):
                self._most[name] = one.difference.max_abs
                self.log.worst[name] = surroundings(name, reference[name], other[name], one.difference, one.tokens)
        self.log.bundle.extend(results.values())
        return results

    def _measured(self, name: str, expected: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray]) -> Measured:
        phase = "cache" if name.startswith("cache.") else self.phase
        tokens = tuple(int(n) for n in (self.lengths if phase != "cache" else np.zeros_like(self.lengths)))
        return Measured(self.step, phase, name, difference(expected[name], got[name]), tokens)

    def _follow(self, eager: Mapping[str, np.ndarray], bundle: Mapping[str, np.ndarray]) -> None:
        """Measure the bundle against PyTorch that rounds by the same rule."""
        self.log.by_rule.extend(self._measured(name, eager, bundle) for name in eager if name != "fed")
        for row, logits in enumerate(last_rows(eager["logits"], self.new_lengths)):
            self.log.best_by_rule[self.step, row] = int(np.argmax(logits))

    def _tally(self, reference_BSV: np.ndarray, other_BSV: np.ndarray) -> None:
        """Add up what the logits mean as predictions; where only the last are given, those."""
        whole = reference_BSV.shape[1] == self._block.shape[1]
        for row, count in enumerate(self.new_lengths.tolist()):
            if not count:
                continue
            sides = [side[row, : count if whole else 1] for side in (reference_BSV, other_BSV)]
            self.log.tally.add(*sides)
            if self.case.perplexity and whole:
                self.log.tally.read(self._block[row, :count], *sides)

    def _choose(self, reference_BSV: np.ndarray, other_BSV: np.ndarray) -> None:
        """Note the best tokens of both sides; the reference's are the next to be fed."""
        expected, got = (last_rows(x, self.new_lengths) for x in (reference_BSV, other_BSV))
        for row, count in enumerate(self.new_lengths):
            if not count:
                continue
            best, other = int(np.argmax(expected[row])), int(np.argmax(got[row]))
            self.log.rows += 1
            self.next_tokens[row] = best
            if best == other:
                self.log.agreed += 1
                continue
            self.log.choices.append(Choice(self.step, row, best, other, margin(expected[row], other)))
            if self.case.free and self.log.parted is None:
                self.log.parted = self.step
