"""Rows as slots in C++: a random schedule over four rows of the toy, whose answer depends on every token of a row."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from .conftest import Programs
from .test_session import Played
from .toy_bundle import CAPACITY, VOCABULARY, answer

SLOTS = 4


def schedule(operations: int, seed: int) -> tuple[list[str], list[str], dict[str, int]]:
    """(lines of a script, what each must print, how often each operation occurs) of joins, leaves, rewinds, copies and
    steps in which some rows bring nothing."""
    draw = random.Random(seed)
    rows: list[list[int]] = [[] for _ in range(SLOTS)]
    lines, expected = [f"open {SLOTS}"], ["0 0 0 0"]
    count = dict.fromkeys(("join", "leave", "rewind", "copy"), 0)

    def lengths() -> str:
        return " ".join(str(len(row)) for row in rows)

    def extend(new: dict[int, list[int]]) -> None:
        for row, tokens in new.items():
            rows[row] += tokens
        if all(len(tokens) == 1 for tokens in new.values()):
            lines.append("step " + ",".join(str(new[r][0]) if r in new else "-1" for r in range(SLOTS)))
        else:
            # a script's last row needs its semicolon where it is empty
            text = ";".join(",".join(map(str, new.get(r, ()))) for r in range(SLOTS))
            lines.append("extend " + text + (";" if SLOTS - 1 not in new and not text.endswith(";") else ""))
        expected.append(" ".join(str(answer(rows[r])) if r in new else "0" for r in range(SLOTS)))

    def drawn(most: int) -> list[int]:
        return [draw.randrange(VOCABULARY - 1) for _ in range(draw.randint(1, most))]

    while sum(count.values()) < operations:
        kind = draw.choice(["join", "leave", "rewind", "copy", "decode", "chunk"])
        row, other = draw.sample(range(SLOTS), 2)
        if kind == "join" and not rows[row]:
            extend({row: drawn(9)})
        elif kind == "leave" and rows[row]:
            rows[row] = []
            lines.append(f"reset {row}")
            expected.append(lengths())
        elif kind == "rewind" and rows[row]:
            rows[row] = rows[row][: draw.randint(0, len(rows[row]))]
            lines.append(f"rewind {row} {len(rows[row])}")
            expected.append(lengths())
        elif kind == "copy" and rows[other]:
            kept = draw.choice([-1, draw.randint(0, len(rows[other]))])
            rows[row] = list(rows[other]) if kept < 0 else rows[other][:kept]
            lines.append(f"copy {other} {row} {kept}")
            expected.append(lengths())
        elif kind in ("decode", "chunk"):
            most = 1 if kind == "decode" else 3
            going = [r for r in range(SLOTS) if rows[r] and len(rows[r]) + 3 <= CAPACITY and draw.random() < .8]
            new = {r: drawn(most) for r in going}
            if new:
                extend(new)
            continue
        else:
            continue
        count[kind] += 1
    return lines, expected, count


@pytest.mark.parametrize("plugin", [True, False], ids=["plugin", "native"])
def test_rows_of_a_random_schedule_are_as_if_each_were_alone(programs: Programs, tmp_path: Path, plugin: bool) -> None:
    lines, expected, count = schedule(200, seed=3)
    assert min(count.values()) > 20
    played = Played(programs, tmp_path, *lines, dtype="float32", plugin=plugin, batch=SLOTS)
    assert played.said == expected


def test_a_row_that_overflowed_leaves_nothing_behind_in_native_attention(programs: Programs, tmp_path: Path) -> None:
    """The toy multiplies what lies beyond the length by 0; its logits are NaN after the vocabulary's last token."""
    played = Played(programs, tmp_path, "open 2", "step 3,4", f"step {VOCABULARY - 1},-1", "reset 0", "step 5,-1",
                    "rewind 1 0", "step -1,6", plugin=False, batch=SLOTS)
    assert played.said[2].startswith("error|row 0's logits are not numbers")
    assert played.said[3:] == ["0 1", f"{answer([5])} 0", "1 0", f"0 {answer([6])}"]


@pytest.mark.parametrize(("line", "what"), [
    ("reset 3", "row 3 does not exist: the batch has 3"),
    ("copy 0 7 1", "row 7 does not exist: the batch has 3"),
    ("copy 9 0 -1", "row 9 does not exist: the batch has 3"),
    ("rewind 0 3", "row 0 holds 2 tokens, and 3 are to be kept"),
    ("rewind 0 -1", "row 0 holds 2 tokens, and -1 are to be kept"),
    ("copy 0 1 3", "row 0 holds 2 tokens, and 3 are to be kept"),
    ("open 9", "the batch has 9 rows, the engine takes 1 to 4"),
    ("open 0", "the batch has 0 rows, the engine takes 1 to 4"),
])
def test_a_row_operation_that_is_not_possible_changes_nothing(programs: Programs, tmp_path: Path, line: str,
                                                              what: str) -> None:
    played = Played(programs, tmp_path, "open 3", "extend 1,2;3;", line, "lengths", batch=SLOTS)
    assert played.said[2].split("|")[:2] == ["error", what]
    assert played.said[3] == "2 1 0"


def test_a_row_does_not_go_back_over_the_length_at_which_its_rotary_table_changes(programs: Programs,
                                                                                 tmp_path: Path) -> None:
    played = Played(programs, tmp_path, "open 2", "extend 1,2,3,4;5", "rewind 0 3", "rewind 0 2", "copy 0 1 1",
                    "reset 0", rope_switch=2)
    assert [line.split("|")[1][:34] if "|" in line else line for line in played.said[2:]] == [
        "3 1", "the first 2 tokens of row 0 may ha", "the first 1 tokens of row 0 may ha", "0 1"]
