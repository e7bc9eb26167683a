"""The kinds of damage to layers that keep a state of fixed size, in bundles of target `ort`: the first such layer is
broken."""

from __future__ import annotations

import numpy as np
from onnx import helper

from evidence.mutations.mutation import Broken, Mutation, NotHere
from gqa_export.graph_io import past_state, present_state
from gqa_export.spec import StateSpec

DECAY, BETA = 4, 5
"""places of these inputs of com.microsoft::LinearAttention"""


def _state(broken: Broken, kind: str) -> StateSpec:
    found = broken.manifest.spec.states_of(kind)
    if not found:
        raise NotHere(f"{kind} state")
    return found[0]


def _recurrence(broken: Broken):  # type: ignore[no-untyped-def]
    return broken.maker(present_state(_state(broken, "recurrent")))


def _read_through(broken: Broken, name: str, *made) -> None:  # type: ignore[no-untyped-def]
    """Let every reader of an input read what `made` makes of it, as NAME/broken; the nodes read NAME/unbroken."""
    for node in broken.model.graph.node:
        for place, tensor in enumerate(node.input):
            if tensor == name:
                node.input[place] = f"{name}/broken"
    for number, node in enumerate(made):
        for place, tensor in enumerate(node.input):
            if tensor == f"{name}/unbroken":
                node.input[place] = name
        node.name = f"broken/{node.op_type}_{number}"
        broken.model.graph.node.insert(number, node)


def _rolled(broken: Broken, source: str, result: str, axis: int) -> tuple:
    """Nodes that move every entry along an axis by one place."""
    one, far, zero, on = (broken.constant(f"broken/roll/{name}", np.array([value], np.int64)) for name, value in
                          (("one", 1), ("far", 1 << 40), ("zero", 0), ("axis", axis)))
    return (helper.make_node("Slice", [source, one, far, on], [f"{result}/rest"]),
            helper.make_node("Slice", [source, zero, one, on], [f"{result}/first"]),
            helper.make_node("Concat", [f"{result}/rest", f"{result}/first"], [result], axis=axis))


def decay_dropped(broken: Broken) -> None:
    """The state never fades."""
    node = _recurrence(broken)
    none = broken.constant("broken/none", np.array(0, np.float32))
    broken.before(node, helper.make_node("Mul", [node.input[DECAY], none], ["broken/decay"]))
    _recurrence(broken).input[DECAY] = "broken/decay"


def beta_of_another_head(broken: Broken) -> None:
    """Every head writes with the strength of the next."""
    node = _recurrence(broken)
    if len(node.input) <= BETA or not node.input[BETA]:
        raise NotHere("beta")
    broken.before(node, *_rolled(broken, node.input[BETA], "broken/beta", 2))
    _recurrence(broken).input[BETA] = "broken/beta"


def convolution_shifted(broken: Broken) -> None:
    """The past inputs of a convolution by one place."""
    name = past_state(_state(broken, "conv"))
    _read_through(broken, name, *_rolled(broken, f"{name}/unbroken", f"{name}/broken", 2))


def state_transposed(broken: Broken) -> None:
    """Keys for values."""
    state = _state(broken, "recurrent")
    if state.shape[1] != state.shape[2]:
        raise NotHere("a square state")
    name = past_state(state)
    _read_through(broken, name, helper.make_node("Transpose", [f"{name}/unbroken"], [f"{name}/broken"],
                                                 perm=[0, 1, 3, 2]))


def padding_leaks(broken: Broken) -> None:
    """Padded tokens change the state of a recurrence."""
    node = _recurrence(broken)
    for place, name in enumerate(node.input):
        if "/real" in name:
            node.input[place] = broken.maker(name).input[1]


def padding_in_the_convolution(broken: Broken) -> None:
    """The last columns are kept, real or not."""
    state = _state(broken, "conv")
    past, present = past_state(state), present_state(state)
    node = next(one for one in broken.model.graph.node if one.op_type == "CausalConvWithState" and past in one.input)
    last, far, on = (broken.constant(f"broken/last/{name}", np.array([value], np.int64)) for name, value in
                     (("last", -state.shape[-1]), ("far", 1 << 40), ("axis", 2)))
    broken.before(node, helper.make_node("Concat", [past, node.input[0]], ["broken/columns"], axis=2),
                  helper.make_node("Slice", ["broken/columns", last, far, on], ["broken/kept"]))
    writer = broken.maker(present)
    writer.CopyFrom(helper.make_node("Identity", ["broken/kept"], [present], name=writer.name))


def state_not_written(broken: Broken) -> None:
    """The state stays what it was."""
    state = _state(broken, "recurrent")
    node = _recurrence(broken)
    node.output[1] = "broken/lost"
    broken.before(node, helper.make_node("Identity", [past_state(state)], [present_state(state)]))


def state_of_another_row(broken: Broken) -> None:
    """The rows of a batch in another order."""
    name = past_state(_state(broken, "recurrent"))
    _read_through(broken, name, *_rolled(broken, f"{name}/unbroken", f"{name}/broken", 0))


def state_begins_elsewhere(broken: Broken) -> None:
    """A little is added to the state at every step, the first too."""
    name = past_state(_state(broken, "recurrent"))
    little = broken.constant("broken/little", np.array(0.01, np.float32))
    _read_through(broken, name, helper.make_node("Add", [f"{name}/unbroken", little], [f"{name}/broken"]))


STATE_MUTATIONS = (
    Mutation("decay dropped", "a state that never fades", decay_dropped, -1),
    Mutation("beta of another head", "heads write with each other's strength", beta_of_another_head, -1),
    Mutation("convolution shifted", "past inputs of a convolution by one place", convolution_shifted, -1),
    Mutation("state transposed", "keys for values in a state", state_transposed, -1),
    Mutation("padding leaks into a state", "padded tokens change a recurrence", padding_leaks, -1),
    Mutation("padding in the convolution", "padded tokens kept as a convolution's past inputs",
             padding_in_the_convolution, -1),
    Mutation("state not written", "a state that stays what it was", state_not_written, -1),
    Mutation("state of another row", "rows of a batch read each other's states", state_of_another_row, -1),
    Mutation("state begins elsewhere", "a state that does not start at zero", state_begins_elsewhere, -1),
)
