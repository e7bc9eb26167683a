"""What the two bodies of `gqa::LongGroupedQueryAttention` share: their variants, the soft cap, the samples, as text."""

from __future__ import annotations

from typing import NamedTuple


class Variant(NamedTuple):
    """Which body: its method, whether there are anchors, whether scores are capped."""

    hyper: bool
    anchors: bool
    softcap: bool


class Method(NamedTuple):
    """Text before the Loop over leaves, of one leaf, and after the Loop."""

    before: str
    of_leaf: str
    after: str


def capped(name: str, scores: str, variant: Variant) -> str:
    """`name` <- the scores, capped where the call says so."""
    if not variant.softcap:
        return f"{name} = Identity ({scores})"
    return (f"{name}_over = Div ({scores}, softcap_or_1)\n{name}_bent = Tanh ({name}_over)\n"
            f"{name}_capped = Mul ({name}_bent, softcap_or_1)\n{name} = Where (has_softcap, {name}_capped, {scores})")


SAMPLES = """
    enough = Min (samples_, width)
    enough_1 = Unsqueeze (enough, axis_0)
    stratum = Range (zero, enough, one)
    stratum_steps = Mul (stratum, fraction_steps)
    used_fractions = Slice (fractions, axis_0, enough_1, axis_1)
    moved = Add (stratum_steps, used_fractions)
    spread_samples = Mul (moved, width)
    all_steps = Mul (enough, fraction_steps)
    sample = Div (spread_samples, all_steps)
    sample_1 = Unsqueeze (sample, axis_last)
    sample_key = GatherND <batch_dims: int = 1> (KEYS, sample_1)
    sample_value = GatherND <batch_dims: int = 1> (VALUES, sample_1)
    sample_key_T = Transpose <perm: ints = [0, 2, 1]> (sample_key)
    width_f = Cast <to: int = 1> (width)
    enough_f = Cast <to: int = 1> (enough)
    stands_for = Div (width_f, enough_f)
    log_weight = Log (stands_for)
"""
