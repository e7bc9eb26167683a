"""A random schedule of requests that join, leave, go back and copy each other's prefixes, over a few rows.

Whatever the schedule, a row's logits must be those of its tokens alone. The tokens that a row reads are drawn at random
where a request joins or goes on with a text of its own, and are the session's own answers where it decodes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SLOTS = 4


class Alone:
    """The greedy answer to a row of tokens, from a session that holds nothing else; each prefix is run once."""

    def __init__(self, session: Any) -> None:
        self._session, self._known = session, {}

    def answer(self, tokens: tuple[int, ...]) -> int:
        if tokens not in self._known:
            self._session.reset(1)
            logits = self._session.step(np.array([tokens])).logits[0]
            for place, row in enumerate(logits):  # of a graph that answers for every token, all prefixes at once
                length = place + 1 if len(logits) == len(tokens) else len(tokens)
                self._known[tokens[:length]] = int(row.argmax())
        return self._known[tokens]


def play(session: Any, alone: Alone, operations: int, *, seed: int, vocabulary: int, longest: int,
         marks: bool, rings: bool = False) -> dict[str, int]:
    """Lead `session` through `operations` joins, leaves, rewinds and copies, with steps in between, and hold every
    answer against `alone`. marks: rows go back only to lengths that they were marked at, rings: to those that the
    session still has. How often each happened."""
    random = np.random.default_rng(seed)
    session.reset(SLOTS)
    rows: list[list[int]] = [[] for _ in range(SLOTS)]
    marked: list[set[int]] = [set() for _ in range(SLOTS)]
    count = dict.fromkeys(("join", "leave", "rewind", "copy", "step"), 0)

    def places(row: int) -> list[int]:
        """To which lengths a row may go back."""
        if marks:
            return sorted(marked[row] | {0, len(rows[row])})
        return [length for length in range(len(rows[row]) + 1)
                if not rings or session.nearest_length(row, length) == length]

    def step(new: dict[int, list[int]]) -> None:
        width = max(map(len, new.values()))
        ids = np.zeros((SLOTS, width), np.int64)
        for row, tokens in new.items():
            ids[row, : len(tokens)] = tokens
            rows[row] += tokens
        logits = session.step(ids, np.array([len(new.get(row, ())) for row in range(SLOTS)])).logits
        assert session.lengths.tolist() == [len(row) for row in rows]
        for row, tokens in new.items():
            got = logits[row, len(tokens) - 1 if logits.shape[1] > 1 else 0]
            assert np.isfinite(got).all()
            assert int(got.argmax()) == alone.answer(tuple(rows[row])), (row, rows[row], count)
        count["step"] += 1
        if random.random() < 0.5:
            row = int(random.integers(SLOTS))
            assert session.mark_row(row) == len(rows[row])
            marked[row].add(len(rows[row]))

    def drawn(most: int) -> list[int]:
        return random.integers(0, vocabulary, random.integers(1, most + 1)).tolist()

    done = 0
    while done < operations:
        kind = random.choice(["join", "leave", "rewind", "copy", "decode", "chunk"], p=(.2, .1, .2, .15, .25, .1))
        row, other = (int(i) for i in random.choice(SLOTS, 2, replace=False))
        room = {r: longest - len(rows[r]) for r in range(SLOTS)}
        if kind == "join" and not rows[row]:
            step({row: drawn(min(9, longest))})
        elif kind == "leave" and rows[row]:
            session.reset_row(row)
            rows[row], marked[row] = [], set()
        elif kind == "rewind" and rows[row]:
            length = int(random.choice(places(row)))
            session.rewind_row(row, length)
            rows[row], marked[row] = rows[row][:length], {m for m in marked[row] if m <= length}
        elif kind == "copy" and rows[other]:
            length = int(random.choice(places(other)))
            session.copy_row(other, row, length)
            rows[row], marked[row] = rows[other][:length], {m for m in marked[other] if m <= length}
        elif kind in ("decode", "chunk"):
            going = [r for r in range(SLOTS) if rows[r] and room[r] >= 4 and random.random() < 0.8]
            if going:
                step({r: drawn(4) if kind == "chunk" else [alone.answer(tuple(rows[r]))] for r in going})
            continue
        else:
            continue
        assert session.lengths.tolist() == [len(r) for r in rows]
        count[kind] += 1
        done += 1
    return count
