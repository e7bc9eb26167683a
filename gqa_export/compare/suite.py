"""The suite: every case by name, the known failure it is aimed at, the level that runs it, and what builds it.

`quick` is made to run in a minute on a small real model; `full` adds what needs thousands of tokens, or what the
quick cases imply but do not show by themselves. A builder that has no room writes a note and gives no case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from ..errors import GqaExportError
from .cases import GARBAGE, Case, Plan, plan_cases
from .setting import Setting

LEVELS = ("quick", "full")
STEPS = {"quick": 32, "full": 32}
"""decode steps of each case where the caller gives no number"""
EDGE = 24
"""capacity of the case that fills its cache: a smaller one than the bundle's, so that it costs nothing"""
DRIFT_STEPS = 1024
FARTHEST = 8192
"""longest sequence of any case"""
SEEN_IDS = 2048
"""ids fed by the case that reads the embedding"""
REFUSALS, IN_PLACE = "refusals", "in_place"
VERIFY_WIDTH = 7
"""new tokens of a step over a past that the case `chunks` feeds, with the logits of each compared"""


@dataclass(frozen=True)
class Entry:
    """One line of the suite. aim: the known failure that it is there to catch."""

    name: str
    level: str
    aim: str
    build: Callable[[Setting], Iterable[Case]]


def _core(name: str) -> Callable[[Setting], Iterable[Case]]:
    return lambda s: [s.core[name]] if name in s.core else []


def _whole_row_mask(s: Setting) -> Iterable[Case]:
    if s.whole_row_masks:
        prompt = s.core["ragged"].prompts[0][:9]
        rows = (prompt, prompt[: len(prompt) // 2])
        yield Case("whole_row_mask", f"batch 2, {len(rows[0])} and {len(rows[1])} tokens, all ones of each row of the "
                   "mask first", rows, ((1, 1),) * min(2, s.steps), max(s.chunk, len(prompt)), whole_row_mask=True)


def _last_slots(s: Setting) -> Iterable[Case]:
    if s.literal:
        return  # its capacity is fixed: the case `full_capacity` fills it
    size = min(EDGE, s.capacity)
    yield Case("last_slots", f"batch 2, one row fills a cache of {size} tokens exactly", (s.ids(size - 3), s.ids(3)),
               ((1, 1),) * 3, max(s.chunk, size), capacity=size)


def _special(s: Setting) -> Iterable[Case]:
    named = [t for t in s.special if 0 <= t < s.spec.vocabulary] or [0]
    some = np.array([*named, s.spec.vocabulary - 1, named[0], named[0]], np.int64)[: max(1, s.capacity - 6)]
    prompt = np.concatenate([some[:1], s.ids(1), some[1:], s.ids(1)])
    yield Case("special", "batch 1, special tokens and the last id amid the prompt", (prompt,), ((1,),) * 2, s.chunk)


def _windows(s: Setting) -> Iterable[Case]:
    for window in s.windows:
        if window + 4 > min(s.capacity, FARTHEST):
            s.notes.append(f"no rows around the window of {window}: the cache holds {s.capacity} tokens")
            continue
        rows = tuple(s.ids(max(1, length)) for length in (window - 1, window, window + 1))
        yield Case(f"window {window}", f"batch 3, rows of {window} - 1, {window} and {window} + 1 tokens", rows,
                   ((1, 1, 1),) * 3, max(16, s.chunk // 3))
        if 4 * window + 3 <= min(s.capacity, FARTHEST):
            yield Case(f"window {window} x 4", f"batch 1, four windows of {window}", (s.ids(4 * window),),
                       ((1,),) * 3, s.chunk)
        else:
            s.notes.append(f"no prompt of four windows of {window}: {min(s.capacity, FARTHEST)} tokens at most")


def _ring(s: Setting) -> Iterable[Case]:
    for slots, window in s.rings:
        length = slots + min(window, 64) + 9
        if length + 8 > min(s.capacity, FARTHEST):
            s.notes.append(f"the ring of {slots} slots was not passed: {min(s.capacity, FARTHEST)} tokens at most")
            continue
        garbage = (*GARBAGE, float("nan")) if s.nan_tail_safe else GARBAGE
        yield Case(f"ring {slots}", f"batch 2, one row decodes across the seam of a ring of {slots} slots, the other "
                   "is past it; what no row sees filled with garbage", (s.ids(slots - 3), s.ids(length)),
                   ((1, 1),) * 3 + ((1, 0), (3, 2)) + ((1, 1),) * 2, max(16, s.chunk // 2), garbage=garbage)


def _far_ring(s: Setting) -> Iterable[Case]:
    for slots, window in s.rings:
        length = min(slots + 4 * window, s.capacity - 8, FARTHEST)
        if length > slots:
            yield Case(f"ring {slots} x 4", f"batch 1, {length} tokens through a ring of {slots} slots, then 8 more",
                       (s.ids(length),), ((1,),) * 8, s.chunk)


def _permuted(s: Setting) -> Iterable[Case]:
    base = s.core["ragged"]
    prompts = (*base.prompts[::-1], base.prompts[0])
    yield Case("permuted", "batch 4, the ragged rows in another order and one of them twice", prompts,
               ((1, 1, 1, 1),) * min(4, s.steps), base.chunk)


def _chunks(s: Setting) -> Iterable[Case]:
    longest = min(s.capacity - 2, max([41, *(w + 9 for w in s.windows if w < 200)]))
    yield Case("chunks", f"batch 2, the prompt of {longest} tokens in pieces of {VERIFY_WIDTH}",
               (s.ids(longest), s.ids(max(1, longest // 2))), ((1, 1),) * 2, VERIFY_WIDTH)


def _switch(s: Setting) -> Iterable[Case]:
    if not s.switch:
        return
    if s.switch + 12 > min(s.capacity, FARTHEST):
        s.notes.append(f"no prompt passes the {s.switch} tokens beyond which longrope's second table serves")
        return
    near, few = max(1, s.switch - 2), min(5, s.switch)
    yield Case("switch", f"batch 2, a row of {near} tokens decodes across longrope's switch at {s.switch}, the other "
               "stays below", (s.ids(near), s.ids(few)), ((1, 1),) * 6, s.chunk)
    yield Case("switched", f"batch 2, rows of {s.switch + 1} and {few} tokens, on both sides of longrope's switch at "
               f"{s.switch}", (s.ids(s.switch + 1), s.ids(few)), ((1, 1),) * 4, s.chunk)


def _one_by_one(s: Setting, length: int) -> int:
    """Tokens that may be fed one by one on one side and at once on the other: keys of before longrope's switch stay as
    they were, so beyond it the two are not the same."""
    return min(length, s.switch or length)


def _stepwise(s: Setting) -> Iterable[Case]:
    length = _one_by_one(s, min(s.capacity - 2, max([24, *(w + 5 for w in s.windows if w < 200)])))
    yield Case("stepwise", f"batch 1, {length} tokens one by one, against PyTorch at once", (s.ids(length),),
               ((1,),) * 2, s.chunk, single=True)


def _empty(s: Setting) -> Iterable[Case]:
    length = min(9, s.capacity - 5)
    yield Case("empty", "batch 2, a row that begins with nothing and later pauses", (s.ids(length), s.ids(0)),
               ((1, 1), (1, 3), (2, 0), (1, 1)), max(s.chunk, length))


def _extreme(s: Setting) -> Iterable[Case]:
    strong = np.array(s.largest or (0,), np.int64)
    prompt = np.concatenate([strong, np.repeat(strong[:1], 12), s.ids(4), np.repeat(strong[-1:], 6)])[: s.capacity - 4]
    yield Case("extreme", "batch 1, the tokens with the largest embeddings, and long runs of one token", (prompt,),
               ((1,),) * 4, s.chunk)


def _beyond(s: Setting) -> Iterable[Case]:
    length = s.original_positions + 33
    if not s.original_positions:
        return
    if length + 4 > min(s.capacity, FARTHEST):
        s.notes.append(f"no prompt passes the rotary scaling's original {s.original_positions} positions")
        return
    yield Case("beyond", f"batch 1, {length} tokens, past the rotary scaling's original {s.original_positions}",
               (s.ids(length),), ((1,),) * 4, s.chunk)


def _drift(s: Setting) -> Iterable[Case]:
    steps = _one_by_one(s, min(DRIFT_STEPS, s.capacity))
    if steps < DRIFT_STEPS:
        s.notes.append(f"{steps} steps of drift instead of {DRIFT_STEPS}: " + (
            f"the cache holds {s.capacity} tokens" if steps == s.capacity else "longrope's other table serves beyond"))
    yield Case("drift", f"batch 1, {steps} tokens one by one, against PyTorch in pieces of 64", (s.ids(steps),), (),
               min(64, s.chunk), single=True)


def _full_capacity(s: Setting) -> Iterable[Case]:
    if s.capacity > FARTHEST:
        s.notes.append(f"the whole cache of {s.capacity} tokens was not filled: {FARTHEST} at most")
        return
    yield Case("full_capacity", f"batch 1, fills the whole cache of {s.capacity} tokens", (s.ids(s.capacity - 4),),
               ((1,),) * 4, s.chunk)


def _vocabulary(s: Setting) -> Iterable[Case]:
    some = np.random.default_rng(22).permutation(s.spec.vocabulary)[:SEEN_IDS].astype(np.int64)
    rows = np.array_split(some, -(-len(some) // min(s.capacity - 1, 512)))
    yield Case("vocabulary", f"{len(some)} of {s.spec.vocabulary} ids, each once", tuple(rows), (),
               max(16, s.chunk // len(rows)))


def _text(s: Setting) -> Iterable[Case]:
    if s.text is None:
        return
    if len(s.text) > min(s.capacity, FARTHEST):
        s.notes.append(f"the text's first {min(s.capacity, FARTHEST)} of {len(s.text)} tokens were read")
    ids = s.text[: min(s.capacity, FARTHEST)]
    yield Case("text", f"batch 1, {len(ids)} tokens of the given text: perplexity", (ids,), (), s.chunk,
               perplexity=True)


SUITE: tuple[Entry, ...] = (
    Entry("teacher_forced", "quick", "a window dropped or off by one, a rotary scaling ignored, a cache written "
          "elsewhere", _core("teacher_forced")),
    Entry("free_running", "quick", "errors too small for one step that change the text", _core("free_running")),
    Entry("ragged", "quick", "right-padded batches garbled; rows that bring several tokens, or none", _core("ragged")),
    Entry("whole_row_mask", "quick", "ragged batches of onnxruntime-genai's Engine, whose masks have all ones of a row "
          "first, answered with NaN or at other positions", _whole_row_mask),
    Entry("garbage_tail", "quick", "what lies beyond the lengths (cache tail, padded ids) leaking into the result",
          _core("garbage_tail")),
    Entry("last_slots", "quick", "the last slots of a static cache overwritten or out of reach", _last_slots),
    Entry("special", "quick", "a pad or end token in the prompt taken for padding", _special),
    Entry(REFUSALS, "quick", "a token past the capacity, an id out of vocabulary or left padding answered with "
          "plausible numbers", lambda s: ()),
    Entry(IN_PLACE, "quick", "a growing bundle of `ort` as users run it, its cache in place: the memory of a row, or a "
          "buffer that grows, mistaken", lambda s: ()),
    Entry("switch", "quick", "the wrong one of longrope's two tables, before, at or after the original length",
          _switch),
    Entry("text", "quick", "quality lost on real text (with --text)", _text),
    Entry("ring N", "quick", "a slot of a ring used again too early, a stale one read, a wrong modulus", _ring),
    Entry("ring N x 4", "full", "the same, four windows past the end of the ring", _far_ring),
    Entry("window W", "full", "the edges of every window, and of attention in chunks: W - 1, W, W + 1 and 4 W",
          _windows),
    Entry("permuted", "full", "rows of a batch influencing each other", _permuted),
    Entry("chunks", "full", "a prompt fed in pieces: positions and masks of the second piece (upper-left causal)",
          _chunks),
    Entry("stepwise", "full", "prefill and decode disagreeing", _stepwise),
    Entry("empty", "full", "a sequence without tokens: NaN from an empty softmax", _empty),
    Entry("extreme", "full", "scores and activations that overflow fp16", _extreme),
    Entry("beyond", "full", "rotary frequencies past the original length", _beyond),
    Entry("vocabulary", "full", "rows of the embedding exchanged or damaged", _vocabulary),
    Entry("drift", "full", "errors that grow with the number of steps", _drift),
    Entry("full_capacity", "full", "tables and buffers shorter than the capacity that the manifest promises",
          _full_capacity),
)


def plan_suite(setting: Setting, level: str = "quick") -> Plan:
    """The cases of a level.

    Args:
        setting: of the bundle; takes notes on what had no room.
        level: "quick", or "full", which contains the cases of "quick".

    Raises:
        GqaExportError: the level is unknown, or the cache is too small to hold a case.
    """
    if level not in LEVELS:
        raise GqaExportError(f"unknown level {level!r}", "--level", f"use one of {', '.join(LEVELS)}",
                             code="E-OPTION-LEVEL")
    core = plan_cases(setting.spec, setting.capacity, steps=setting.steps, special=setting.avoided or (),
                      original_positions=setting.original_positions, text_ids=setting.sample,
                      nan_tail_safe=setting.nan_tail_safe, windows=setting.windows)
    setting.core = {case.name: case for case in core.cases}
    setting.notes += core.notes
    setting.steps = min(setting.steps, setting.capacity // 2)
    chosen = LEVELS[: LEVELS.index(level) + 1]
    cases = [replace(case, entry=entry.name, chunk=setting.piece(case)) for entry in SUITE if entry.level in chosen
             for case in entry.build(setting)]
    return Plan(tuple(cases), tuple(setting.notes))
