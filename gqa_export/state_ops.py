"""The ops of layers that keep a state of fixed size, `gqa::LinearAttention` and `gqa::CausalConv`, version 1, as data.

Linear attention keeps one matrix per head: linear attention proper, gated linear attention, the delta rule and the
gated delta rule (Gated DeltaNet, Kimi delta attention), Mamba-2 and Mamba-1 are all this one recurrence. The causal
convolution keeps the inputs that its kernel still reaches. Every place that spells an op out (the torch op and its
fake, the ONNX function body, the documentation) is held to these tables by `tests/test_state_ops.py`. A change of
signature bumps `VERSION`.

Dimension key: B batch, S new tokens (padded on the right), Hq query heads, Hk key heads, Hv value heads and states
(multiples of Hq and of Hk: value head h reads query head h // (Hv / Hq)), Dk size of queries and keys, Dv of values,
Dg 1 (one decay for a head) or Dk (one for each key dimension), C channels, K kernel size (at least 2).

Types: T is the type of the activations (fp16, bf16, fp32; fp64 in the reference); F is fp32 whatever T is (fp64 in
the reference). Arithmetic is done in F.

Padded positions, those at or past new_lengths, never touch a state, be they NaN; a row that brings no token keeps its
state bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DOMAIN = "gqa"
VERSION = 1

RULES = ("linear", "gated", "delta", "gated_delta")
"""the update rules, by the number that the attribute `rule` has"""
ACTIVATIONS = ("", "silu")
"""what the convolution applies to its sums, by the number that the attribute `activation` has"""


@dataclass(frozen=True)
class StatePort:
    """One tensor of an op.

    `optional`: the torch op takes None. In ONNX it is always given, with `neutral` in every place, because a function
    body cannot branch on which inputs a call has.
    """

    name: str
    shape: tuple[str, ...]
    type: Literal["T", "F", "int64"] = "T"
    optional: bool = False
    neutral: float = 0.0
    meaning: str = ""


@dataclass(frozen=True)
class StateAttribute:
    """One attribute. All are numbers, none has a default: every call writes every attribute."""

    name: str
    type: Literal["int", "float"]
    meaning: str


@dataclass(frozen=True)
class StateOp:
    """The signature of an op. Its last output is the state that its input `state` becomes."""

    name: str
    torch_name: str
    inputs: tuple[StatePort, ...]
    outputs: tuple[StatePort, ...]
    attributes: tuple[StateAttribute, ...]

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs in order."""
        return tuple(port.name for port in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The outputs in order."""
        return tuple(port.name for port in self.outputs)

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """The attributes in order."""
        return tuple(attribute.name for attribute in self.attributes)

    def input_index(self, name: str) -> int:
        """Position of an input, by name."""
        return self.input_names.index(name)


LINEAR_ATTENTION = StateOp(
    "LinearAttention", "linear_attention",
    inputs=(
        StatePort("query", ("B", "S", "Hq", "Dk"), meaning="new queries"),
        StatePort("key", ("B", "S", "Hk", "Dk"), meaning="new keys"),
        StatePort("value", ("B", "S", "Hv", "Dv"), meaning="new values"),
        StatePort("decay", ("B", "S", "Hv", "Dg"), "F", optional=True,
                  meaning="logarithm of the factor on the state, for a head or for each of its key dimensions; given "
                          "with the gated rules, 0 otherwise"),
        StatePort("beta", ("B", "S", "Hv"), "F", optional=True, neutral=1.0,
                  meaning="how far the state moves to the new value; given with the delta rules, 1 otherwise"),
        StatePort("state", ("B", "Hv", "Dk", "Dv"), "F", meaning="the state before the first new token"),
        StatePort("new_lengths", ("B",), "int64", meaning="valid new tokens per sequence, 0 to S"),
    ),
    outputs=(
        StatePort("output", ("B", "S", "Hv", "Dv"), meaning="rows at or past new_lengths are zero"),
        StatePort("new_state", ("B", "Hv", "Dk", "Dv"), "F", meaning="the state after the last valid new token"),
    ),
    attributes=(
        StateAttribute("rule", "int", "0 linear, 1 gated, 2 delta, 3 gated delta"),
        StateAttribute("scale", "float", "factor on the output"),
    ))

CAUSAL_CONV = StateOp(
    "CausalConv", "causal_conv",
    inputs=(
        StatePort("x", ("B", "C", "S"), meaning="new inputs"),
        StatePort("weight", ("C", "K"), meaning="one kernel per channel; its last column meets the token itself"),
        StatePort("bias", ("C",), optional=True, meaning="added to the sums; 0 is none"),
        StatePort("state", ("B", "C", "K-1"), "F", meaning="the inputs before the first new one, the latest last"),
        StatePort("new_lengths", ("B",), "int64", meaning="valid new tokens per sequence, 0 to S"),
    ),
    outputs=(
        StatePort("y", ("B", "C", "S"), meaning="columns at or past new_lengths are zero"),
        StatePort("new_state", ("B", "C", "K-1"), "F", meaning="the last K-1 valid inputs, those of `state` included"),
    ),
    attributes=(
        StateAttribute("activation", "int", "0 none, 1 SiLU"),
    ))

STATE_OPS = (LINEAR_ATTENTION, CAUSAL_CONV)


def is_gated(rule: str) -> bool:
    """Whether a rule multiplies the state by a decay."""
    return rule in ("gated", "gated_delta")


def is_delta(rule: str) -> bool:
    """Whether a rule moves the state towards the new value instead of adding it."""
    return rule in ("delta", "gated_delta")
