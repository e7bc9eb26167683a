"""A growing bundle of `ort` as its users run it: its cache bound in place, in a buffer that doubles.

The other cases hand ONNX Runtime arrays, so that padding can be filled with garbage; then the graph makes a new cache
at every call. Here the same open graph serves both ways, and the answers must be the same: the weights are read,
rounded and laid out once, and only attention may add up in another order.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..compare.case_verdict import CaseVerdict, KindVerdict, Location
from ..compare.suite import IN_PLACE
from ..compare.tolerance import EPSILON, tolerance

if TYPE_CHECKING:
    from ..targets import Target

FIRST_ROOM = 4
"""tokens of the buffer at first: the rows below double it twice"""
FEEDS = ((6, (6, 3)), (1, (1, 1)), (2, (2, 1)), (1, (0, 1)), (1, (1, 1)), (1, (1, 1)))
"""how many ids a step brings, and how many of them each row takes"""


def judge_in_place(session: Any, folder: Path, provider: str, target: Target, opened: list[Any], dtype: str,
                   part: str) -> tuple[CaseVerdict, ...]:
    """Compare a bundle's session with one that keeps its cache in place.

    Args:
        session: the bundle's, as the other cases ran it.
        folder: of the bundle that it runs.
        provider: "cpu" or "cuda".
        target: as of `OrtSession.load`.
        opened: the session of ONNX Runtime that it calls; empty where it has none, or keeps its cache in place already.
        dtype: number format that is run.
        part: as of `CaseVerdict`.

    Returns:
        One case; none where users' sessions of this bundle have no such buffer.
    """
    from ..runtime.ort.session import OrtSession

    began, vocabulary = time.perf_counter(), session.spec.vocabulary
    if not opened:
        return ()
    users = OrtSession.load(folder, provider, target=target, opened=opened[0])
    if not users.buffered or session.capacity < FIRST_ROOM + sum(width for width, _ in FEEDS):
        return ()
    if session.adapter:
        users.use_adapter(session.adapter)
    users.first_room = FIRST_ROOM
    random = np.random.default_rng(31)
    feeds = [(random.integers(vocabulary, size=(2, width)), np.array(new)) for width, new in FEEDS]
    pairs: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for answers, each in zip(pairs, (session, users)):
        each.reset(2)
        answers += [_of_tokens(each.step(ids, new).logits, new) for ids, new in feeds]
    kinds = [_kind("logits", list(zip(*pairs, strict=True)), dtype, "decode")]
    caches = [_of_rows(each, other, session.lengths) for mine, theirs in
              zip(session.cache(), users.cache(), strict=True) for each, other in zip(mine, theirs)]
    if caches:  # a model of states alone has none
        kinds.append(_kind("cache", caches, dtype, "cache"))
    session.reset(1)
    return (CaseVerdict(IN_PLACE, "batch 2, the cache in place in a buffer that doubles, as users run this bundle, "
                        "against the other cases' way", 2, tuple(FEEDS[0][1]), len(FEEDS) - 1, False, tuple(kinds), 0,
                        0, (), None, None, time.perf_counter() - began, entry=IN_PLACE, part=part),)


def _of_tokens(logits: np.ndarray, new: np.ndarray) -> np.ndarray:
    """[N, V]: the logits of the tokens that were fed, or of each row's last one."""
    if logits.shape[1] == 1:
        return logits[new > 0, 0]
    return logits[np.arange(logits.shape[1]) < new[:, None]]


def _of_rows(one: np.ndarray, other: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both [N, K, D]: what two caches hold of the rows' tokens."""
    first, second = (each.swapaxes(1, 2)[:, : int(lengths.max())] for each in (one, other))
    held = np.arange(int(lengths.max())) < lengths[:, None]
    return first[held], second[held]


def _kind(kind: str, pairs: list[tuple[np.ndarray, np.ndarray]], dtype: str, phase: str) -> KindVerdict:
    """The pair farthest past its bound. The rounding of two orders of addition is assumed, as between bundles."""
    found = []
    for step, (expected, got) in enumerate(pairs):
        expected, got = expected.astype(np.float64), got.astype(np.float64)
        gap = np.where((expected == got) | (np.isnan(expected) & np.isnan(got)), 0.0, np.abs(expected - got))
        gap = np.where(np.isnan(gap), np.inf, gap)
        scale = float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0))
        allowed = tolerance(None, scale, dtype)
        largest = float(gap.max(initial=0.0))
        place = tuple(int(i) for i in np.unravel_index(int(gap.argmax()), gap.shape)) if gap.size else ()
        found.append((largest / (allowed.bound or EPSILON[dtype]), step, largest, allowed, place, expected, got))
    _, step, largest, allowed, place, expected, got = max(found, key=lambda each: each[0])
    where = kind if phase == "decode" else f"layer {step // 2} cached {('key', 'value')[step % 2]}"
    first = Location(IN_PLACE, step if phase == "decode" else len(FEEDS) - 1, phase, where,
                     dict(zip(("token", "head", "feature") if phase == "cache" else ("token", "id"), place)),
                     float(expected[place]), float(got[place]), largest, allowed.bound,
                     int((~np.isfinite(got)).sum())) if largest > allowed.bound else None
    return KindVerdict(kind, where, largest, allowed.bound, allowed.baseline, allowed.basis, first)
