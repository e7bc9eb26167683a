"""The kinds of damage to caches whose slots are used again, in the function body of a `portable` bundle with rings
(`--window-cache small`)."""

from __future__ import annotations

from onnx import FunctionProto, NodeProto, helper

from evidence.mutations.mutation import Broken, Mutation, NotHere
from gqa_export import attention_op


def _body(broken: Broken) -> FunctionProto:
    for function in broken.model.functions:
        if function.name == attention_op.OP and any("held_BT" in node.output for node in function.node):
            return function
    raise NotHere("a ring")


def _maker(broken: Broken, value: str) -> tuple[FunctionProto, int]:
    body = _body(broken)
    return body, next(place for place, node in enumerate(body.node) if value in node.output)


def _rewrite(broken: Broken, value: str, op: str, *inputs: str, before: tuple[NodeProto, ...] = ()) -> None:
    """Let a value of the body be made by another node, and put nodes before it."""
    body, place = _maker(broken, value)
    body.node[place].CopyFrom(helper.make_node(op, inputs, [value]))
    for node in reversed(before):
        body.node.insert(place, node)


def modulus_off_by_one(broken: Broken) -> None:
    """The slots are counted modulo one less."""
    _rewrite(broken, "behind_BT", "Mod", "ahead_BT", "broken_T",
             before=(helper.make_node("Sub", ["T", "single"], ["broken_T"]),))


def seam_off_by_one(broken: Broken) -> None:
    """The last token is taken to be the one before it: the newest lies in a slot that is read a round too old."""
    _rewrite(broken, "last_B1", "Sub", "total_B1", "broken_two",
             before=(helper.make_node("Add", ["one", "one"], ["broken_two"]),))


def never_wraps(broken: Broken) -> None:
    """A slot is taken for the position of its token, as in a cache that keeps all."""
    _rewrite(broken, "held_BT", "Mul", "cache_T", "broken_ones", before=(
        helper.make_node("Equal", ["behind_BT", "behind_BT"], ["broken_same"]),
        helper.make_node("Cast", ["broken_same"], ["broken_ones"], to=7)))


def stale_slot_read(broken: Broken) -> None:
    """The token that a slot held one round before is seen too: the window's far edge is one farther."""
    _rewrite(broken, "before_BS1", "Sub", "broken_position", "reach",
             before=(helper.make_node("Sub", ["position_BS1", "one"], ["broken_position"]),))


def behind_the_window_read(broken: Broken) -> None:
    """Values behind every row's window are multiplied by 0, also where they are NaN."""
    _rewrite(broken, "value_f", "Identity", "value_32")


def empty_slots_read(broken: Broken) -> None:
    """Slots that hold no token yet are seen."""
    _rewrite(broken, "causal_BST", "Identity", "not_later_BST")


def written_one_slot_on(broken: Broken) -> None:
    """New tokens are taken from the place before theirs."""
    _rewrite(broken, "new_place_BT", "Add", "token_BT", "broken_shift",
             before=(helper.make_node("Sub", ["shift_B1", "one"], ["broken_shift"]),))


def old_slots_lost(broken: Broken) -> None:
    """What is older than the new tokens is dropped as soon as a slot is used again."""
    _rewrite(broken, "valid_BT", "And", "broken_new", "before_end_BT", before=(
        helper.make_node("Greater", ["total_B1", "T"], ["broken_wrapped"]),
        helper.make_node("Not", ["broken_wrapped"], ["broken_whole"]),
        helper.make_node("Not", ["from_past_BT"], ["broken_is_new"]),
        helper.make_node("And", ["broken_is_new", "begun_BT"], ["broken_new_there"]),
        helper.make_node("And", ["broken_whole", "begun_BT"], ["broken_whole_there"]),
        helper.make_node("Or", ["broken_new_there", "broken_whole_there"], ["broken_new"])))


RING_MUTATIONS = (
    Mutation("modulus off by one", "slots counted modulo one less", modulus_off_by_one, -1),
    Mutation("seam off by one", "the newest token read as one of a round before", seam_off_by_one, -1),
    Mutation("never wraps", "a slot taken for a position", never_wraps, -1),
    Mutation("stale slot read", "one token behind the window seen", stale_slot_read, -1),
    Mutation("behind the window read", "NaN behind the window multiplied by 0", behind_the_window_read, -1),
    Mutation("empty slots read", "slots without a token seen", empty_slots_read, -1),
    Mutation("written one slot on", "new tokens in the slot of another", written_one_slot_on, -1),
    Mutation("old slots lost", "the past dropped when slots are used again", old_slots_lost, -1),
)
