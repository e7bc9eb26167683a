"""How many codes of a quantized cache are not those nearest to the reference's numbers, and how many may be.

In fp16 and bf16 a number is that far off that many codes may be one or the other, so PyTorch takes the bundle's where
they are next to its own numbers. One wrong step of rounding, or of a scale, then hides in what is allowed to each code;
it does not hide in how many codes are others. PyTorch in the same number format, on the same cache, shows how many its
rounding moves. A right bundle is another draw of the same errors: FACTOR times as many are allowed, but never all (half
of those that PyTorch does not move), and FLOOR where PyTorch moves none.
"""

from __future__ import annotations

from .case_driver import CodeShare
from .case_verdict import KindVerdict, Location

CODES = "codes"
FACTOR = 2.0
FLOOR = 0.02


def allowed(own: float) -> float:
    """The share of codes that may be others, where PyTorch's own share is this."""
    return max(FLOOR, min(FACTOR * own, (1 + own) / 2))


def judge_codes(share: CodeShare, case: str, step: int) -> KindVerdict:
    """Hold the share of other codes against PyTorch's own. case: its name. step: the last one of it."""
    found, own = share.apart / share.total, share.own / share.total
    bound = allowed(own)
    output = "codes of the cache"
    first = None if found <= bound else Location(case, step, CODES, output, {}, own, found, found, bound)
    return KindVerdict(CODES, output, found, bound, own, "floor" if bound == FLOOR else "baseline", first)
