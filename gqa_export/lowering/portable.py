"""Canonical op -> the canonical op with its function body: nothing is rewritten, any runtime that knows ONNX functions
computes it.

The state ops are written as their bodies, in standard ops.
`attention_function.inline` makes a copy without functions for a runtime that knows none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..graph.passes import Pass
from .attention_calls import check_attention
from .attention_function import attach_function, is_call
from .context import Context
from .state_calls import check_states, number_of_states
from .state_functions import inline as inline_states

if TYPE_CHECKING:
    import onnx

PREPARE = None
PASSES = (
    Pass("check_attention", check_attention, expect=lambda context: len(context.spec.layers)),
    Pass("check_states", check_states, expect=number_of_states),
)


def finish(model: onnx.ModelProto, context: Context) -> onnx.ModelProto:
    """Attach the function and count its calls; write the bodies of the state ops."""
    attach_function(model)
    context.log.counts["attach_function"] = sum(map(is_call, model.graph.node))
    return inline_states(model)
