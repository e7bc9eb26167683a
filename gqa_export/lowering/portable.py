"""Canonical op -> the canonical op with its function body: nothing is rewritten, any runtime that knows ONNX functions
computes it.

`attention_function.inline` makes a copy without functions for a runtime that knows none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..graph.passes import Pass
from .attention_calls import check_attention
from .attention_function import attach_function, is_call
from .context import Context

if TYPE_CHECKING:
    import onnx

PREPARE = None
PASSES = (
    Pass("check_attention", check_attention, expect=lambda context: len(context.spec.layers)),
)


def finish(model: onnx.ModelProto, context: Context) -> onnx.ModelProto:
    """Attach the function and count its calls."""
    attach_function(model)
    context.log.counts["attach_function"] = sum(map(is_call, model.graph.node))
    return model
