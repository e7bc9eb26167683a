"""What a wrong output looks like, in words: hypotheses that are tried with PyTorch's own numbers.

A hypothesis is believed if it explains the output as well as rounding would. Dimensions as in
`gqa_export.attention_op`; everything in fp64. """

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

CLOSE = 2e-3
"""share of the error that may be left when a hypothesis is believed"""


def _explains(guess: np.ndarray, expected: np.ndarray, got: np.ndarray) -> bool:
    error = np.abs(got - expected).max()
    return bool(np.isfinite(guess).all() and np.abs(got - guess).max() <= CLOSE * error)


def attention_words(attended: Any, expected_SW: np.ndarray, got_SW: np.ndarray) -> str:
    """Why an attention op's output is wrong though its inputs are right; "" if nothing fits."""
    if not np.isfinite(got_SW).all():
        return "NaN or infinite: a softmax over nothing, or an overflow"
    for words, guess in _attention_guesses(attended):
        if guess.size == got_SW.size and _explains(guess.reshape(got_SW.shape), expected_SW, got_SW):
            return words
    return rounding_words(expected_SW, got_SW)


def _attention_guesses(a: Any) -> Iterator[tuple[str, np.ndarray]]:
    steps, total = a.query.shape[1], a.key.shape[1]
    causal = np.tril(np.ones((steps, total), bool), total - steps)
    upper = np.tril(np.ones((steps, total), bool))
    distance = (np.arange(steps) + total - steps)[:, None] - np.arange(total)
    seen = a.mask > -1e30 if a.mask is not None else causal
    now = int(seen.sum(1).max())
    yield "no window: every earlier token is seen (wrong mask)", attend(a, causal)
    for window in sorted({now - 1, now + 1, *range(1, min(total, 600)), 1024, 2048, 4096}, key=lambda w: abs(w - now)):
        if 0 < window < total + 2:
            yield (f"a window of {window} instead of {now if now < total else 'none'} (wrong mask)",
                   attend(a, causal & (distance < window)))
    yield "the causal triangle starts at the first key (upper-left, wrong mask)", attend(a, upper)
    yield "no causal mask (wrong mask)", attend(a, np.ones_like(causal))
    if a.softcap:
        yield "softcap dropped", attend(replace(a, softcap=0.0), seen)
    if a.sinks is not None:
        yield "attention sinks dropped", attend(replace(a, sinks=None), seen)
        yield "attention sinks are zero", attend(replace(a, sinks=np.zeros_like(a.sinks)), seen)
    heads, groups = a.query.shape[0], a.key.shape[0]
    for words, scale in (("dropped (1)", 1.0), ("1 / sqrt(head size)", a.query.shape[-1] ** -0.5),
                         ("1 / head size", 1.0 / a.query.shape[-1])):
        yield f"wrong scale: {words} instead of {a.scale:.6g}", attend(replace(a, scale=scale), seen)
    for factor in (0.5, 0.9, 0.95, 0.99, 0.999, 1.001, 1.01, 1.05, 1.1, 2.0):
        yield f"wrong scale: {factor:g} times {a.scale:.6g}", attend(replace(a, scale=a.scale * factor), seen)
    if 1 < groups < heads:
        order = np.arange(heads).reshape(-1, groups).T.ravel()
        yield ("wrong head order: query heads dealt to the key/value heads in turn",
               attend(replace(a, query=a.query[order]), seen)[:, np.argsort(order)])
        swapped = [1, 0, *range(2, groups)]
        yield ("wrong head order: two key/value heads exchanged",
               attend(replace(a, key=a.key[swapped], value=a.value[swapped]), seen))


def attend(a: Any, seen_ST: np.ndarray) -> np.ndarray:
    """Attention [S, H, E] of an `Attended` with another mask."""
    group = a.query.shape[0] // a.key.shape[0]
    key, value = np.repeat(a.key, group, 0), np.repeat(a.value, group, 0)
    scores = np.einsum("hsd,htd->hst", a.query, key) * a.scale
    if a.softcap:
        scores = a.softcap * np.tanh(scores / a.softcap)
    scores = np.where(seen_ST, scores, -np.inf)
    sinks = np.full(len(scores), -np.inf) if a.sinks is None else a.sinks
    top = np.maximum(scores.max(-1), sinks[:, None])
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - top[..., None])
        total = weights.sum(-1) + np.exp(sinks[:, None] - top)
    return np.einsum("hst,hte->she", weights / total[..., None], value)


def rotation_words(expected_KTD: np.ndarray, got_KTD: np.ndarray, straight_KTD: np.ndarray | None) -> str:
    """Why keys in the cache are wrong. straight: the keys before rotation, where they are known."""
    if not np.isfinite(got_KTD).all():
        return "NaN or infinite keys"
    heads, tokens, size = expected_KTD.shape
    if heads > 1:
        for order in ([1, 0, *range(2, heads)], list(range(heads))[::-1]):
            if _explains(expected_KTD[order], expected_KTD, got_KTD):
                return "wrong head order: two key/value heads exchanged"
    gone = np.abs(got_KTD).max((0, 2)) == 0
    if gone.any() and not (np.abs(expected_KTD).max((0, 2)) == 0).all():
        return f"a stale cache: nothing was written at token {int(np.argmax(gone))}"
    if straight_KTD is None or straight_KTD.shape != expected_KTD.shape:
        return rounding_words(expected_KTD, got_KTD)
    if _explains(straight_KTD, expected_KTD, got_KTD):
        return "wrong rotation: keys are not rotated"
    half = size // 2

    def angles(rotated: np.ndarray) -> np.ndarray:
        pair = rotated[..., :half] + 1j * rotated[..., half:]
        base = straight_KTD[..., :half] + 1j * straight_KTD[..., half:]
        return (pair * base.conj() / np.maximum(np.abs(base) ** 2, 1e-12)).mean(0)  # [T, R / 2], over heads

    kept = np.abs(np.abs(angles(got_KTD)) - np.abs(angles(expected_KTD))).max()
    if kept < 1e-2:  # lengths of the halves' pairs survive: an angle is wrong, not the pairing
        turn = angles(got_KTD) / angles(expected_KTD)
        turned = np.abs(np.angle(turn)).max()
        if turned < 2e-3:
            return f"wrong rotation: cos and sin in low precision (angles off by {turned:.1e})"
        if np.abs(turn - turn[:1]).max() < 1e-2:
            return "wrong rotation: positions are shifted by a constant"
        if np.abs(angles(got_KTD) - angles(expected_KTD).conj()).max() < 1e-2:
            return "wrong rotation: the sine's sign"
        first = int(np.argmax((np.abs(np.angle(turn)) > 1e-2).any(1)))
        return f"wrong rotation: other angles from token {first} on (base, scaling or positions)"
    pairs = straight_KTD.reshape(heads, tokens, half, 2)
    lengths = np.linalg.norm(got_KTD.reshape(heads, tokens, half, 2), axis=-1)
    if np.abs(lengths - np.linalg.norm(pairs, axis=-1)).max() < 1e-2:
        return "wrong rotation: interleaved pairs (2i, 2i + 1) instead of halves, or the reverse"
    return rounding_words(expected_KTD, got_KTD)


def linear_words(x_SI: np.ndarray, weight_OI: np.ndarray, bias: np.ndarray | None, expected: np.ndarray,
                 got: np.ndarray, head_size: int = 0) -> str:
    """Why a matrix product is wrong though its input is right."""
    if weight_OI.shape[0] == weight_OI.shape[1] and _explains(
            x_SI @ weight_OI + (0 if bias is None else bias), expected, got):
        return "transposed weight"
    if bias is not None and _explains(expected - bias, expected, got):
        return "bias dropped"
    precise = rounding_words(expected, got)
    if precise:
        return precise
    wrong = np.flatnonzero(np.abs(got - expected).max(0) > 1e-4 * np.abs(expected).max())
    if len(wrong) <= max(2, expected.shape[1] // 16):
        return f"row{'s' if len(wrong) > 1 else ''} {', '.join(map(str, wrong[:8]))} of the weight differ"
    if head_size and expected.shape[1] % head_size == 0:
        heads = [part.reshape(len(part), -1, head_size).swapaxes(0, 1) for part in (expected, got)]
        nearest = [int(np.abs(heads[0] - head).max((1, 2)).argmin()) for head in heads[1]]
        fits = all(np.abs(heads[0][n] - heads[1][h]).max() < 1e-3 * np.abs(expected).max()
                   for h, n in enumerate(nearest))
        if fits and nearest != sorted(nearest):
            return f"wrong head order: heads {nearest} where 0 .. {len(nearest) - 1} belong"
    return "another matrix"


def rounding_words(expected: np.ndarray, got: np.ndarray) -> str:
    """"precision ..." where the error is as large as a low-precision format makes it, and everywhere."""
    scale = np.abs(expected).max()
    some = np.abs(expected) > 1e-3 * scale
    signed = ((got - expected)[some]) / expected[some]
    share = np.abs(signed)
    if not share.size or not np.isfinite(share).all():
        return ""
    if abs(signed.mean()) > 0.5 * share.mean():
        return "every element is off by nearly the same factor" if share.std() < 0.5 * share.mean() else ""
    for name, ulp in (("fp16", 2.0**-11), ("bf16", 2.0**-8)):
        if share.max() < 4 * ulp and ulp / 16 < np.median(share) < ulp:
            return f"precision: rounded to {name} on the way"
    return ""
