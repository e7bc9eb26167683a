"""A model of one call of a state op, fresh inputs for it, and its fp64 reference. Dimensions as in the contract."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from gqa_export import graph_io, state_ops
from gqa_export.graph import edit
from gqa_export.graph.passes import Pass, run_passes
from gqa_export.lowering import state_functions
from gqa_export.lowering.context import Context, LowerOptions
from gqa_export.lowering.state_calls import fused_states
from gqa_export.spec import ModelSpec, StateSpec
from gqa_export.state_ops import ACTIVATIONS, CAUSAL_CONV, LINEAR_ATTENTION, RULES, StateOp, is_delta, is_gated
from gqa_export.targets import get_target
from gqa_export.trace.states import ops

Feeds = dict[str, np.ndarray]
EXTRA_ROUNDINGS = 8
"""of one term: exp, beta, the difference to what the state holds, scale, the sigmoid of SiLU"""


def linear_feeds(rule: str, lengths: list[int], *, steps: int = 0, heads: tuple[int, int, int] = (2, 2, 4),
                 sizes: tuple[int, int] = (8, 6), per_key: bool = False, decay: float = 1.0, seed: int = 0,
                 poison: bool = True) -> Feeds:
    """Random inputs of linear attention, in fp32, states not zero. decay: how strong it is. With `poison`, whatever is
    not a valid token is NaN. Keys have unit length, as the delta rules need them."""
    random, steps = np.random.default_rng(seed), steps or max(lengths)
    batch, (hq, hk, hv), (dk, dv) = len(lengths), heads, sizes

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    key = draw(batch, steps, hk, dk)
    feeds = {
        "query": draw(batch, steps, hq, dk), "key": key / np.linalg.norm(key, axis=-1, keepdims=True),
        "value": draw(batch, steps, hv, dv),
        "decay": -decay * np.log1p(np.exp(draw(batch, steps, hv, dk if per_key else 1))),
        "beta": 1 / (1 + np.exp(-draw(batch, steps, hv))), "state": draw(batch, hv, dk, dv),
        "new_lengths": np.array(lengths, np.int64)}
    if poison:
        for row, length in enumerate(lengths):
            for name in ("query", "key", "value", "decay", "beta"):
                feeds[name][row, length:] = np.nan
    if not is_gated(rule):
        feeds["decay"] = np.zeros((1, 1, 1, 1), np.float32)
    if not is_delta(rule):
        feeds["beta"] = np.ones((1, 1, 1), np.float32)
    return feeds


def of_one_key(feeds: Feeds, beta: float) -> Feeds:
    """The same inputs where every token has the key of the first, as a prompt that repeats a word has: a chunk's
    triangular system is then ill-conditioned, and a kernel that inverts it by powers loses all digits."""
    return {**feeds, "key": np.repeat(feeds["key"][:, :1], feeds["key"].shape[1], axis=1),
            "beta": np.full_like(feeds["beta"], beta)}


def conv_feeds(lengths: list[int], *, steps: int = 0, channels: int = 5, kernel: int = 4, bias: bool = True,
               seed: int = 0, poison: bool = True) -> Feeds:
    """Random inputs of the convolution, in fp32, states not zero. poison: as of `linear_feeds`."""
    random, steps = np.random.default_rng(seed), steps or max(lengths)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    feeds = {"x": draw(len(lengths), channels, steps), "weight": draw(channels, kernel),
             "bias": draw(channels) if bias else np.zeros(1, np.float32),
             "state": draw(len(lengths), channels, kernel - 1), "new_lengths": np.array(lengths, np.int64)}
    if poison:
        for row, length in enumerate(lengths):
            feeds["x"][row, :, length:] = np.nan
    return feeds


def reference(op: StateOp, feeds: Feeds, attributes: dict[str, Any]) -> list[np.ndarray]:
    """The op in fp64 on the same numbers, by PyTorch."""
    wide = {name: torch.from_numpy(np.ascontiguousarray(value)) if value.dtype == np.int64
            else torch.from_numpy(value.astype(np.float64)) for name, value in feeds.items()}
    if op is CAUSAL_CONV:
        bias = wide.pop("bias")
        results = ops.causal_conv(**wide, bias=bias if len(bias) == wide["x"].shape[1] else None,
                                  activation=ACTIVATIONS[attributes["activation"]])
    else:
        rule = RULES[attributes["rule"]]
        wide |= {"decay": wide["decay"] if is_gated(rule) else None, "beta": wide["beta"] if is_delta(rule) else None}
        results = ops.linear_attention(**wide, rule=rule,
                                       scale=float(np.float32(attributes["scale"])))  # an attribute is an fp32 number
    return [tensor.numpy() for tensor in results]


def op_model(op: StateOp, feeds: Feeds, attributes: dict[str, Any], opset: int = 23) -> onnx.ModelProto:
    """The call alone. Inputs are typed as `feeds`; heads and sizes are literal, batch and steps named. One-element
    inputs (neutral ones) are constants, as a trace writes them."""
    axes = {"B": "batch", "S": "sequence"}

    def info(port: state_ops.StatePort, array: np.ndarray | None, element: int) -> onnx.ValueInfoProto:
        dims = [axes.get(letter) or (int(array.shape[place]) if array is not None else None)
                for place, letter in enumerate(port.shape)]
        return helper.make_tensor_value_info(names.get(port.name, port.name), element, dims)

    state = state_of(op, feeds)
    names = {"state": graph_io.past_state(state), "new_state": graph_io.present_state(state)}
    elements = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in feeds.items()}
    constant = {name for name, value in feeds.items() if value.size == 1 and name in ("decay", "beta", "bias")}
    inputs = [info(port, feeds[port.name], elements[port.name]) for port in op.inputs if port.name not in constant]
    outputs = [info(port, None, elements[op.input_names[0] if port.type == "T" else "state"]) for port in op.outputs]
    node = helper.make_node(op.name, [names.get(name, name) for name in op.input_names],
                            [names.get(name, name) for name in op.output_names], name="layers.0/call",
                            domain=state_ops.DOMAIN, **attributes)
    tensors = [onnx.numpy_helper.from_array(feeds[name], name) for name in sorted(constant)]
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(state_ops.DOMAIN, state_ops.VERSION)]
    graph = helper.make_graph([node], "one_state_op", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def run(model: onnx.ModelProto, feeds: Feeds) -> list[np.ndarray]:
    """The outputs of a model in ONNX Runtime, on one thread, without a warning."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs_of(session.get_inputs(), feeds))


def inputs_of(inputs: Iterable[Any], feeds: Feeds) -> Feeds:
    """`feeds` by the names of a graph's inputs: a state goes by another one there."""
    return {value.name: feeds[value.name] if value.name in feeds else feeds["state"] for value in inputs}


def state_of(op: StateOp, feeds: Feeds) -> StateSpec:
    """The spec of the state of a call."""
    return StateSpec(0, "conv" if op is CAUSAL_CONV else "recurrent", 0, op.torch_name, feeds["state"].shape[1:])


def lowered(op: StateOp, model: onnx.ModelProto, feeds: Feeds, target: str, lower_states: Any,
            runtime_ops: frozenset[str] | None = None) -> onnx.ModelProto:
    """The call after a target's pass, and what that left written as its body."""
    spec = ModelSpec(model_type="one_op", architecture="OneOp", vocabulary=1, hidden_size=1, max_positions=0, rope="",
                     layers=(), states=(state_of(op, feeds),))
    context = Context(spec, get_target(target), LowerOptions(target, runtime_ops=runtime_ops), model)
    graph = edit.load(model)
    run_passes(graph, [Pass("lower_states", lower_states, expect=fused_states)], context, context.log)
    return state_functions.inline(edit.save(graph))


def roundings(op: StateOp, feeds: Feeds) -> int:
    """How often a value is rounded on its way into the largest result: once for each step and for each term of a dot
    product."""
    if op is CAUSAL_CONV:
        return feeds["weight"].shape[1] + EXTRA_ROUNDINGS
    return feeds["value"].shape[1] + feeds["state"].shape[2] + EXTRA_ROUNDINGS


def largest(op: StateOp, feeds: Feeds, results: np.ndarray) -> float:
    """The size of the terms whose roundings add up: the results themselves, or the products of a convolution."""
    if op is LINEAR_ATTENTION:
        return max(float(np.abs(results).max(initial=0)), 1)
    inputs = max(np.nan_to_num(np.abs(feeds[name])).max(initial=0) for name in ("x", "state"))
    return float(np.abs(feeds["weight"]).sum(1).max() * inputs + np.abs(feeds["bias"]).max())


def assert_same(op: StateOp, actual: list[np.ndarray], feeds: Feeds, attributes: dict[str, Any],
                unit: float = 2.0 ** -24, output_unit: float = 0.0) -> None:
    """Output and state are those of the fp64 reference, up to the roundings of arithmetic whose unit roundoff is
    `unit`, relative to the largest value; what is padded is zero; a row without new tokens keeps its state.

    output_unit: unit roundoff of the type of the output, where that is narrower.
    """
    expected = reference(op, feeds, attributes)
    for port, mine, theirs in zip(op.outputs, actual, expected, strict=True):
        assert mine.shape == theirs.shape, port.name
        own = output_unit * np.abs(theirs) if port.type == "T" else 0
        bound = roundings(op, feeds) * unit * largest(op, feeds, theirs) + own
        off = np.abs(mine.astype(np.float64) - theirs)
        assert (off <= bound).all(), f"{port.name}: off by {np.nanmax(off):.3g} (NaN: {np.isnan(off).any()}), " \
                                     f"allowed {np.max(bound):.3g}"
    for row, length in enumerate(feeds["new_lengths"]):
        padded = actual[0][row, :, length:] if op is CAUSAL_CONV else actual[0][row, length:]
        assert not padded.any(), f"output of row {row} at its padding"
        if not length:
            np.testing.assert_array_equal(actual[1][row], feeds["state"][row], err_msg=f"state of idle row {row}")


CASES: list[tuple[StateOp, Feeds, dict[str, Any]]] = [
    *((LINEAR_ATTENTION, linear_feeds(rule, [5, 0, 1, 3], seed=1), {"rule": RULES.index(rule), "scale": 0.3})
      for rule in RULES),
    *((LINEAR_ATTENTION, linear_feeds(rule, [4, 2, 0], per_key=True, heads=(1, 3, 6), seed=2),
       {"rule": RULES.index(rule), "scale": 1.0}) for rule in ("gated", "gated_delta")),
    *((LINEAR_ATTENTION, linear_feeds(rule, [1, 0, 1], seed=3), {"rule": RULES.index(rule), "scale": 0.3})
      for rule in RULES),
    # longer than the chunks of 64 in which fused kernels work
    (LINEAR_ATTENTION, linear_feeds("gated_delta", [130, 65, 64, 1], seed=4), {"rule": 3, "scale": 0.3}),
    (LINEAR_ATTENTION, linear_feeds("gated", [130, 63, 0], seed=5), {"rule": 1, "scale": 0.3}),
    # factors that underflow, and factors of one
    (LINEAR_ATTENTION, linear_feeds("gated_delta", [9, 4], decay=1e4, seed=6), {"rule": 3, "scale": 0.3}),
    (LINEAR_ATTENTION, linear_feeds("gated", [70, 4], decay=1e4, per_key=True, seed=7), {"rule": 1, "scale": 0.3}),
    (LINEAR_ATTENTION, linear_feeds("gated_delta", [9, 4], decay=0.0, seed=8), {"rule": 3, "scale": 0.3}),
    # chunks that are badly conditioned: one key again and again, and keys longer than the delta rule likes
    *((LINEAR_ATTENTION, of_one_key(linear_feeds("gated_delta", [130, 64], decay=0.0, seed=11, poison=False), beta),
       {"rule": 3, "scale": 0.3}) for beta in (1.0, 1.9)),
    (LINEAR_ATTENTION, {name: value * np.float32(1.38) if name == "key" else value
                        for name, value in linear_feeds("gated_delta", [130, 64], decay=0.01, seed=12).items()},
     {"rule": 3, "scale": 0.3}),
    # Mamba-1: every channel is a head of one value, keys and queries are shared by all
    (LINEAR_ATTENTION, linear_feeds("gated", [7, 0, 3], heads=(1, 1, 48), sizes=(16, 1), per_key=True, seed=9),
     {"rule": 1, "scale": 1.0}),
    *((CAUSAL_CONV, conv_feeds(lengths, kernel=kernel, bias=bias, seed=10), {"activation": activation})
      for lengths, kernel, bias, activation in (
          ([5, 0, 1, 3], 4, True, 1), ([5, 0, 1, 3], 4, False, 0), ([1, 0, 1], 4, True, 1), ([1], 2, False, 1),
          ([130, 65, 0], 3, True, 0), ([3, 2, 1], 9, True, 1))),
]
"""calls that every form of the ops is held to: ragged batches with rows of 0 and 1 token and NaN in the padding, all
rules, decays, sharings of heads, kernels"""


def label(case: tuple[StateOp, Feeds, dict[str, Any]]) -> str:
    """A readable name of a case."""
    op, feeds, attributes = case
    kind = RULES[attributes["rule"]] if op is LINEAR_ATTENTION else ACTIVATIONS[attributes["activation"]] or "plain"
    shapes = "x".join(map(str, feeds["state"].shape[1:]))
    return f"{op.name}-{kind}-{shapes}-{'+'.join(map(str, feeds['new_lengths']))}"


def in_type(feeds: Feeds, element: int) -> Feeds:
    """The same inputs with activations and weights in another type; states, decays and betas stay."""
    dtype = helper.tensor_dtype_to_np_dtype(element)
    return {name: value.astype(dtype) if name in ("query", "key", "value", "x", "weight", "bias") else value
            for name, value in feeds.items()}


def widened(feeds: Feeds) -> Feeds:
    """The same numbers in fp32, where they were narrower: what the reference takes."""
    return {name: value if value.dtype in (np.int64, np.float64) else value.astype(np.float32)
            for name, value in feeds.items()}


HALVES = {TensorProto.FLOAT16: 2.0 ** -11, TensorProto.BFLOAT16: 2.0 ** -8}
"""narrow types and their unit roundoff: an output is rounded to them once"""


def fed_in_fp32(model: onnx.ModelProto, element: int) -> onnx.ModelProto:
    """A copy that takes and gives fp32 where `model` takes and gives `element`: ONNX Runtime's Python cannot pass
    bfloat16, and a number that is already of the narrow type passes through unchanged."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph, outside = copy.graph, {}
    for value in [*graph.input, *graph.output]:
        if value.type.tensor_type.elem_type == element:
            outside[value.name] = f"{value.name}_narrow"
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        node.input[:] = [outside.get(name, name) for name in node.input]
        node.output[:] = [outside.get(name, name) for name in node.output]
    for place, value in enumerate(graph.input):
        if value.name in outside:
            graph.node.insert(0, helper.make_node("Cast", [value.name], [outside[value.name]], to=element,
                                                  name=f"narrow_{place}"))
    for place, value in enumerate(graph.output):
        if value.name in outside:
            graph.node.append(helper.make_node("Cast", [outside[value.name]], [value.name], to=TensorProto.FLOAT,
                                               name=f"wide_{place}"))
    return copy
