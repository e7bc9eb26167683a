"""Which matrices get more bits: the least sum of their errors in so many bytes.

Each matrix has a lower and a higher number of bits; the higher one costs bytes and spares error. To choose within a
limit is a knapsack problem, and because sizes of matrices have large common divisors, it is solved exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

MOST_STEPS = 1 << 16
"""of the budget. Where the common divisor of the sizes asks for more, sizes are rounded up to a step"""


@dataclass(frozen=True)
class Upgrade:
    """What a matrix's higher number of bits costs, in bytes, and what it spares of the sum of errors."""

    cost: int
    gain: float


class Upgrades:
    """The best upgrades for every budget."""

    def __init__(self, upgrades: Sequence[Upgrade]) -> None:
        self.upgrades = tuple(upgrades)
        self.step = math.gcd(*(each.cost for each in upgrades)) or 1
        self.step = max(self.step, -(-self.whole // MOST_STEPS))

    @property
    def whole(self) -> int:
        """Bytes of all of them."""
        return sum(each.cost for each in self.upgrades)

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """Most that is spared with so many steps; and for each upgrade and number of steps, whether it is taken."""
        costs = [-(-each.cost // self.step) for each in self.upgrades]
        best = np.zeros(sum(costs) + 1)
        taken = np.zeros((len(costs), len(best)), bool)
        for number, (cost, each) in enumerate(zip(costs, self.upgrades, strict=True)):
            if each.gain <= 0:
                continue
            more = best[: len(best) - cost] + each.gain
            better = more > best[cost:]
            taken[number, cost:] = better
            best[cost:] = np.where(better, more, best[cost:])
        return best, taken

    def within(self, budget: int) -> frozenset[int]:
        """The numbers of the upgrades that together spare most and cost at most `budget` bytes."""
        best, taken = self._table
        steps = min(max(budget, 0) // self.step, len(best) - 1)
        chosen = set()
        for number in range(len(self.upgrades) - 1, -1, -1):
            if taken[number, steps]:
                chosen.add(number)
                steps -= -(-self.upgrades[number].cost // self.step)
        return frozenset(chosen)

    def sparing(self, gain: float) -> int:
        """The smallest budget whose best upgrades spare so much; that of all where none does."""
        best, _ = self._table
        return int(np.searchsorted(best, gain)) * self.step if gain <= best[-1] else self.whole
