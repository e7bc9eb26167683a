"""Damage to rotary embedding: the flag, the pairing and the tables of layer 1."""

from __future__ import annotations

import numpy as np

from evidence.mutations.mutation import Broken, NotHere

L = 1


def rotary_flipped(broken: Broken) -> None:
    """Pairs where halves are meant."""
    flipped = broken.attribute(broken.attention(L), "rotary_interleaved")
    if not broken.attribute(broken.attention(L), "do_rotary").i:
        raise NotHere("rotary inside")
    flipped.i = 1 - flipped.i


def rotary_dropped(broken: Broken) -> None:
    """Queries and keys are not rotated."""
    inside = broken.attribute(broken.attention(L), "do_rotary")
    if not inside.i:
        raise NotHere("rotary inside")
    inside.i = 0


def _own_tables(broken: Broken, change) -> None:
    """Give layer 1 rotary tables of its own: change(angles [M, R/2]) -> (cos, sin)."""
    node = broken.attention(L)
    if len(node.input) < 9 or not node.input[7]:
        raise NotHere("rotary inside")
    cos, sin = broken.read(node.input[7]), broken.read(node.input[8])
    size = np.hypot(cos, sin)  # scaled rotary types lengthen the vectors too
    new_cos, new_sin = change(np.unwrap(np.arctan2(sin, cos), axis=0))
    node.input[7] = broken.constant("broken/cos", (size * new_cos).astype(cos.dtype))
    node.input[8] = broken.constant("broken/sin", (size * new_sin).astype(sin.dtype))


def theta_changed(broken: Broken) -> None:
    """Another base of the frequencies."""
    def change(angles):
        factor = 1.3 ** -(np.arange(angles.shape[1]) / angles.shape[1])
        return np.cos(angles * factor), np.sin(angles * factor)
    _own_tables(broken, change)


def rotary_backwards(broken: Broken) -> None:
    """The sine's sign."""
    _own_tables(broken, lambda angles: (np.cos(angles), -np.sin(angles)))


def rotary_positions_shifted(broken: Broken) -> None:
    """Positions count from one: scores stay the same, the cache does not."""
    _own_tables(broken, lambda angles: (np.cos(np.roll(angles, -1, 0)), np.sin(np.roll(angles, -1, 0))))


def tables_in_fp16(broken: Broken) -> None:
    """cos and sin rounded to half precision."""
    _own_tables(broken, lambda angles: (np.cos(angles).astype(np.float16), np.sin(angles).astype(np.float16)))


def positions_clamped(broken: Broken) -> None:
    """Positions stop at 64, a scaling's original length."""
    rows = np.minimum(np.arange(broken.manifest.capacity), 63)
    _own_tables(broken, lambda angles: (np.cos(angles[rows]), np.sin(angles[rows])))


def tables_too_short(broken: Broken) -> None:
    """The tables' last two rows repeat the one before: only a cache that is filled shows it."""
    rows = np.minimum(np.arange(broken.manifest.capacity), broken.manifest.capacity - 3)
    _own_tables(broken, lambda angles: (np.cos(angles[rows]), np.sin(angles[rows])))
