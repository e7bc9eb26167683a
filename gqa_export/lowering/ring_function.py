"""The body of the op with a third cache mode: a ring of T slots, in which token t of a sequence is in slot t mod T.

Models without a ring keep the body of `attention_function` as it is; this one differs in the lines below. It asks each
slot which token it holds, `token_BT`, where the other asks for the slot's number. Dimensions as in
`gqa_export.attention_op`.
"""

from __future__ import annotations

CHANGED: tuple[tuple[str, str], ...] = (
    ("    grown = Mul (S, growing_)", """    ring_ = Constant <value_int: int = 2> ()
    is_ring = Equal (growing_, ring_)
    is_growing = Equal (growing_, one)
    grows = Cast <to: int = 7> (is_growing)
    grown = Mul (S, grows)"""),
    ("    from_past_BT = Less (cache_T, past_B1)", """    last_B1 = Sub (total_B1, one)
    ahead_BT = Sub (last_B1, cache_T)
    behind_BT = Mod (ahead_BT, T)
    held_BT = Sub (last_B1, behind_BT)
    token_BT = Where (is_ring, held_BT, cache_T)
    from_past_BT = Less (token_BT, past_B1)"""),
    ("    new_place_BT = Add (cache_T, shift_B1)", "    new_place_BT = Add (token_BT, shift_B1)"),
    ("    valid_BT = Less (cache_T, total_B1)", """    before_end_BT = Less (token_BT, total_B1)
    begun_BT = GreaterOrEqual (token_BT, zero)
    valid_BT = And (before_end_BT, begun_BT)"""),
    ("    causal_BST = LessOrEqual (cache_T, position_BS1)", """    token_B1T = Unsqueeze (token_BT, axis_1)
    valid_B1T = Unsqueeze (valid_BT, axis_1)
    not_later_BST = LessOrEqual (token_B1T, position_BS1)
    causal_BST = And (not_later_BST, valid_B1T)"""),
    ("    near_BST = Greater (cache_T, before_BS1)", "    near_BST = Greater (token_B1T, before_BS1)"),
    ("    over_capacity_B1 = Greater (total_B1, T)", """    room = Sub (T, window_)
    most_new = Add (room, one)
    over_room_B1 = Greater (new_B1, most_new)
    over_end_B1 = Greater (total_B1, T)
    not_ring = Not (is_ring)
    over_ring_B1 = And (over_room_B1, is_ring)
    over_whole_B1 = And (over_end_B1, not_ring)
    over_capacity_B1 = Or (over_ring_B1, over_whole_B1)"""),
    # what lies behind every row's window may be NaN, which a weight of 0 does not remove
    ("    value_f = Cast <to: int = 1> (present_value)", """    value_32 = Cast <to: int = 1> (present_value)
    unseen_B1 = Sub (past_B1, reach)
    in_window_BT = Greater (token_BT, unseen_B1)
    whole_cache = Not (is_ring)
    in_sight_BT = Or (in_window_BT, whole_cache)
    in_sight_B1T1 = Unsqueeze (in_sight_BT, axes_1_3)
    value_f = Where (in_sight_B1T1, value_32, zero_f)"""),
)
"""line of the body -> the lines that take its place"""


def with_ring(body: str) -> str:
    """The text of the body with the ring in it.

    Raises:
        ValueError: a line that it takes the place of is not there once.
    """
    for line, changed in CHANGED:
        if body.count(f"{line}\n") != 1:
            raise ValueError(f"the body of the op has the line {line.strip()!r} {body.count(line)} times, expected 1")
        body = body.replace(f"{line}\n", f"{changed}\n")
    return body
