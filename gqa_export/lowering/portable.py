"""Canonical op -> the canonical op with its function body: nothing is rewritten, any ONNX runtime computes it.

`body.inline` makes a copy without functions for a runtime that knows none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .attention_function import attach_function, is_call
from .context import Context

if TYPE_CHECKING:
    import onnx

PREPARE = None
PASSES = ()


def finish(model: onnx.ModelProto, context: Context) -> onnx.ModelProto:
    """Attach the function and count its calls."""
    attach_function(model)
    context.counts["attach_function"] = sum(map(is_call, model.graph.node))
    return model
