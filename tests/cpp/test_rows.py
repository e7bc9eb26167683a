"""Rows as slots in C++: a random schedule over four rows of the toy, whose answer depends on every token of a row."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from gqa_export.spec import WindowCache

from .conftest import Programs
from .test_session import Played
from .toy_bundle import CAPACITY, LAYERS, PROMPT, VOCABULARY, WINDOW, answer, engine_facts, manifest

SLOTS = 4


def schedule(operations: int, seed: int, ring: bool = False) -> tuple[list[str], list[str], dict[str, int]]:
    """(lines of a script, what each must print, how often each operation occurs) of joins, leaves, rewinds, copies and
    steps in which some rows bring nothing."""
    draw = random.Random(seed)
    rows: list[list[int]] = [[] for _ in range(SLOTS)]
    ends = [0] * SLOTS  # of what each row ever wrote
    lines, expected = [f"open {SLOTS}"], ["0 0 0 0"]
    count = dict.fromkeys(("join", "leave", "rewind", "copy"), 0)

    def lengths() -> str:
        return " ".join(str(len(row)) for row in rows)

    def extend(new: dict[int, list[int]]) -> None:
        for row, tokens in new.items():
            rows[row] += tokens
            ends[row] = max(ends[row], len(rows[row]))
        if all(len(tokens) == 1 for tokens in new.values()):
            lines.append("step " + ",".join(str(new[r][0]) if r in new else "-1" for r in range(SLOTS)))
        else:
            # a script's last row needs its semicolon where it is empty
            text = ";".join(",".join(map(str, new.get(r, ()))) for r in range(SLOTS))
            lines.append("extend " + text + (";" if SLOTS - 1 not in new and not text.endswith(";") else ""))
        expected.append(" ".join(str(answer(rows[r], ring=ring)) if r in new else "0" for r in range(SLOTS)))

    def back(row: int) -> int:
        """A length to which a row can go back: of a ring of 7 slots what the window of 3 sees must be there."""
        held = [length for length in range(len(rows[row]) + 1) if not ring or length == 0 or set(
            range(max(0, length - WINDOW + 1), length)) <= set(range(max(0, ends[row] - WINDOW - PROMPT), ends[row]))]
        return draw.choice(held)

    def drawn(most: int) -> list[int]:
        return [draw.randrange(VOCABULARY - 1) for _ in range(draw.randint(1, most))]

    while sum(count.values()) < operations:
        kind = draw.choice(["join", "leave", "rewind", "copy", "decode", "chunk"])
        row, other = draw.sample(range(SLOTS), 2)
        if kind == "join" and not rows[row]:
            extend({row: drawn(9)})
        elif kind == "leave" and rows[row]:
            rows[row], ends[row] = [], 0
            lines.append(f"reset {row}")
            expected.append(lengths())
        elif kind == "rewind" and rows[row]:
            rows[row] = rows[row][: back(row)]
            ends[row] = ends[row] if rows[row] else 0
            lines.append(f"rewind {row} {len(rows[row])}")
            expected.append(lengths())
        elif kind == "copy" and rows[other]:
            kept = draw.choice([-1, back(other)])
            rows[row] = list(rows[other]) if kept < 0 else rows[other][:kept]
            ends[row] = ends[other] if rows[row] else 0
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


def test_rows_over_a_ring_are_as_if_each_were_alone(programs: Programs, tmp_path: Path) -> None:
    """The last layer has 7 slots for a capacity of 16: rows pass the end of their ring twice."""
    lines, expected, count = schedule(200, seed=4, ring=True)
    assert min(count.values()) > 20
    assert Played(programs, tmp_path, *lines, dtype="float32", batch=SLOTS, ring=True).said == expected


def test_a_row_over_a_ring_goes_back_a_prompt_chunk_and_no_farther(programs: Programs, tmp_path: Path) -> None:
    """Of 12 tokens the ring of 7 has 5 .. 11. At length 7 a row sees 5 and 6; at length 6 it would see 4."""
    tokens = list(range(3, 15))
    played = Played(programs, tmp_path, "prefill " + ",".join(map(str, tokens)), "rewind 0 6", "copy 0 0 1",
                    "rewind 0 9", "rewind 0 6", "rewind 0 7", "step 1", "reset 0", "step 5", ring=True,
                    dtype="float32")
    assert played.said[0] == str(answer(tokens, ring=True))
    refused = ("what row 0 would see at {} tokens is no longer there: its windowed layers keep a window and 4 tokens "
               "more")
    for line, length, held in ((1, 6, 12), (2, 1, 12), (4, 6, 9)):
        assert played.said[line].split("|")[:2] == ["error", refused.format(length)]
        assert f"keep 0, or 7 to {held} tokens" in played.said[line]
    assert played.said[5:] == ["7", str(answer([*tokens[:7], 1], ring=True)), "0", str(answer([5], ring=True))]


def test_a_row_whose_run_failed_after_it_displaced_tokens_must_be_read_again(programs: Programs,
                                                                          tmp_path: Path) -> None:
    tokens = ",".join(str(3 + i) for i in range(8))
    played = Played(programs, tmp_path, "open 1", "extend 1,2", f"extend {tokens},{VOCABULARY - 1}", "lengths",
                    "step 3", "reset 0", "step 4", ring=True, dtype="float32")
    assert played.said[2].startswith("error|row 0's logits are not numbers")
    assert played.said[3] == "2"
    assert played.said[4].split("|")[1] == "a run of row 0 failed after it had displaced what its windowed layers see"
    assert played.said[5:] == ["0", str(answer([4], ring=True))]


def test_an_engine_that_takes_more_at_once_than_its_rings_hold_is_refused(programs: Programs, tmp_path: Path) -> None:
    path = tmp_path / "gqa_export.json"
    made = manifest(engine_facts(True), ring=True)
    path.write_text(replace(made, window_cache=WindowCache(PROMPT - 1, (LAYERS - 1,))).to_json())
    said = programs.run("session_on_toy", path, expect=2)
    assert "takes 4 new tokens at once, and its windowed layers keep room for 3" in said


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
