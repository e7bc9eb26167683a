"""Bits of each matrix within a limit: of the bundle's bytes, or of what rounding does to predictions.

Every matrix's error is measured with 4 bits and with 8 (`quantizing.errors_of_bits`). Within a number of bytes those
get 8 that together spare most (`quantizing.choose_bits`). Within a KL divergence, which only running the model tells,
the bytes are searched for: with as few as possible the best choice of that size stays below it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.quantization import PLAIN, BitsSearch
from ..errors import GqaExportError
from ..progress import Progress
from ..quantized.facts import facts_of
from ..quantizing.choose_bits import Upgrade, Upgrades
from ..quantizing.errors_of_bits import in_one_unit
from .limits import CHOICES

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint
    from ..lowering.dump import PassDump
    from ..quantizing.divergence import Divergence
    from .options import ExportOptions
    from .prepared import Prepared
    from .weight_plan import Plan

MOST_EVALUATIONS = 7
"""choices whose KL divergence is measured"""
CLOSE = 0.01
"""of the bytes between all 4 bits and all 8: nearer to the least is not searched for"""
REPEATS = 32
"""times that a choice may turn out too large: padding and the graph's own bytes differ by little"""
With = Callable[["Plan", "PassDump | None"], "Prepared"]


class _Fit:
    """A plan whose open matrices have some number of bits each."""

    def __init__(self, ready: Prepared, plan: Plan) -> None:
        assert ready.quantization is not None
        errors, self.unit = in_one_unit(plan.open)
        self.plan = replace(plan, errors=errors)
        self._weight = {weight.name: ready.traced.spec.depth for weight in plan.weights if weight.role == "head"
                        and self.unit == "relative"}
        self.held = {each.name for each in ready.quantization.weights if each.operator != PLAIN}
        self.names = tuple(name for name in plan.open if name in self.held)
        # zero points are counted where a lookup reads the matrix too; what is left over is padding
        looked_up = {weight.name for weight in plan.weights if weight.role in ("head", "embedding")}
        self.upgrades = Upgrades([self._upgrade(name, name in looked_up) for name in self.names])

    def _upgrade(self, name: str, looked_up: bool) -> Upgrade:
        found = self.plan.open[name]
        rows, columns = math.prod(found.shape[:-1]), found.shape[-1]
        blocks = -(-columns // found.block)
        codes = (blocks * found.block + (blocks if looked_up else 0)) * (CHOICES[1] - CHOICES[0]) // 8
        return Upgrade(rows * codes, self.lost(name, CHOICES[0]) - self.lost(name, CHOICES[1]))

    def all(self) -> frozenset[int]:
        """Every matrix for which more bits are better."""
        return self.upgrades.within(self.upgrades.whole)

    def lost(self, name: str, bits: int) -> float:
        """What counts of a matrix's error. Without a text the head's counts as often as there are layers: it reads all
        of the sum to which each layer adds its part."""
        return self.plan.errors[name][bits] * self._weight.get(name, 1)

    def cost(self, chosen: Collection[int]) -> int:
        """Bytes that 8 bits cost for the chosen ones."""
        return sum(self.upgrades.upgrades[number].cost for number in chosen)

    def error(self, chosen: Collection[int]) -> float:
        """The sum of the errors with 8 bits for the chosen ones."""
        return math.fsum(self.lost(name, CHOICES[number in chosen]) for number, name in enumerate(self.names))

    def choose(self, chosen: Collection[int], limits: ExportOptions) -> Plan:
        """The plan with 8 bits for the chosen ones."""
        matrices, facts = dict(self.plan.matrices), dict(self.plan.facts)
        for number, name in enumerate(self.names):
            matrices[name] = self.plan.open[name].quantized(CHOICES[number in chosen])
            facts[name] = facts_of(matrices[name], lossless=False)
        search = BitsSearch(limits.max_size, limits.max_kl, self.unit, self.error(chosen), self.error(self.all()),
                            self.error(()), len(chosen), len(self.names))
        return replace(self.plan, matrices=matrices, facts=facts, search=search)


def fitted(ready: Prepared, plan: Plan, prepared: With, measured: Callable[[], Divergence], say: Progress,
           dump: PassDump | None = None) -> Prepared:
    """The export with the bits that its limits allow.

    Args:
        ready: the export with the lowest number of bits everywhere.
        plan: of it.
        prepared: makes the export of another plan.
        measured: opens what measures the KL divergence.
        say: progress.
        dump: of the graph that is written.

    Raises:
        GqaExportError: no choice is within the limits; the nearest one is named.
    """
    from .bundle_files import bundle_bytes

    fit, options = _Fit(ready, plan), ready.options
    chosen = fit.all()
    if options.max_size:
        say("choosing bits within the size", None, None)
        chosen = _within_size(fit, options, lambda found: bundle_bytes(prepared(found, None)))
    found = fit.choose(chosen, options)
    if options.max_kl is not None:
        found = _within_kl(fit, options, chosen, measured(), say)
    return prepared(found, dump)


def divergence_of(checkpoint: Checkpoint, plan: Plan, folder: Path) -> Divergence:
    """What measures the KL divergence of choices: on tokens that no scale was chosen with. folder: for its file."""
    from ..quantizing.divergence import Divergence

    return Divergence(checkpoint, plan.apart, folder)


def _within_size(fit: _Fit, options: ExportOptions, size_of: Callable[[Plan], int]) -> frozenset[int]:
    """The best choice whose bundle is not larger than the limit. size_of: bytes of a plan's bundle."""
    limit, least = options.max_size, size_of(fit.choose(frozenset(), options))
    least += max(len(str(least)) - len(str(limit)), 0)  # the manifest has the limit
    if least > limit:
        raise GqaExportError(
            f"the smallest bundle has {least / 1e6:,.3f} MB ({least:,} bytes: weights, graph and "
            f"tokenizer), --max-size allows {limit / 1e6:,.3f} MB",
            "--max-size",
            f"allow {least:,} bytes or more"
            + ("" if options.head in ("", "same") else ", or let head and embedding have fewer bits with --head same"),
            code="E-OPTION-MAX-SIZE",
        )
    budget = limit - least
    for _ in range(REPEATS):
        chosen = fit.upgrades.within(budget)
        beyond = size_of(fit.choose(chosen, options)) - limit if chosen else 0
        if beyond <= 0:
            return chosen
        budget = min(budget - beyond, fit.cost(chosen) - 1)
    return frozenset()


def _within_kl(fit: _Fit, options: ExportOptions, most: frozenset[int], divergence: Divergence, say: Progress) -> Plan:
    """The smallest choice, of the best ones of each size, whose KL divergence is within the limit. most: the largest
    choice that is allowed."""
    assert options.max_kl is not None
    limit, measured = options.max_kl, 0

    def evaluate(chosen: frozenset[int]) -> tuple[Plan, float]:
        nonlocal measured
        say("measuring the KL divergence", measured, MOST_EVALUATIONS)
        measured += 1
        plan = fit.choose(chosen, options)
        kl = divergence.of({name: matrix for name, matrix in plan.matrices.items() if name in fit.held})
        assert plan.search is not None
        return replace(plan, search=replace(plan.search, kl=kl, kl_tokens=divergence.tokens)), kl

    best, high = evaluate(most)
    if high > limit:
        size = f" of at most {options.max_size / 1e6:,.1f} MB" if options.max_size else ", all of 8 bits,"
        raise GqaExportError(
            f"the best choice{size} has a KL divergence of {high:.4g} (mean over {divergence.tokens} "
            f"tokens), --max-kl allows {limit:g}",
            "--max-kl",
            f"allow {1.01 * high:.3g} or more"
            + (
                ", or a larger bundle"
                if options.max_size
                else ", or leave matrices as they are with rules: --quantize FILE.toml"
            ),
            code="E-OPTION-MAX-KL",
        )
    lowest, low = evaluate(frozenset())
    if low <= limit:
        return _counted(lowest, measured)
    upgrades = fit.upgrades
    few, many = 0, fit.cost(most)
    errors = {0: fit.error(()), many: fit.error(most)}
    close = max(int(CLOSE * many), upgrades.step)
    while measured < MOST_EVALUATIONS and many - few > close:
        # between two measurements the divergence is about a line over the sum of errors
        share = (limit - high) / (low - high) if low > high else 0.5
        wanted = errors[many] + min(max(0.97 * share, 0.1), 0.9) * (errors[few] - errors[many])
        bytes_ = min(max(upgrades.sparing(errors[0] - wanted), few + close // 2), many - close // 2)
        chosen = upgrades.within(bytes_)
        plan, kl = evaluate(chosen)
        errors[bytes_] = fit.error(chosen)
        if kl <= limit:
            best, many, high = plan, bytes_, kl
        else:
            few, low = bytes_, kl
    return _counted(best, measured)


def _counted(plan: Plan, evaluations: int) -> Plan:
    assert plan.search is not None
    return replace(plan, search=replace(plan.search, evaluations=evaluations))
