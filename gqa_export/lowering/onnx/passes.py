"""Canonical op -> standard operators only: ai.onnx Attention, RotaryEmbedding, RMSNormalization, TensorScatter.

Opset 23 with a growing cache, 24 with a static one (TensorScatter is new there; every op of 23 means the same in 24).
A layer that Attention cannot hold keeps the canonical op and its function body. Linear attention is the operator of
opset 27 where the installed runtime has it, else it is written in those of 23, as convolutions are. Source: onnx
docs/Operators.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...graph.passes import Pass
from ..attention_calls import only_fallbacks_are_left
from ..attention_function import attach_function, is_call
from ..context import Context
from ..state_calls import fused_states
from ..state_functions import inline as inline_states
from . import states
from .attention import lower_attention
from .fusions import fuse_rms_norm, fuse_rotary

if TYPE_CHECKING:
    import onnx

OPSETS = {"growing": 23, "static": 24}

PREPARE = None
PASSES = (
    Pass("fuse_rms_norm", fuse_rms_norm),
    Pass("fuse_rotary", fuse_rotary),
    Pass("lower_attention", lower_attention, requires=("fuse_rotary",), ensures=only_fallbacks_are_left,
         expect=lambda context: len(context.spec.layers) - len(context.fallbacks)),
    Pass("lower_states", states.lower_states, expect=fused_states),
)


def finish(model: onnx.ModelProto, context: Context) -> onnx.ModelProto:
    """Set the opset; attach the function if a layer kept the canonical op; write the bodies of the state ops that are
    left."""
    for entry in model.opset_import:
        if entry.domain == "":
            entry.version = max(OPSETS[context.options.cache], states.needs_opset(context))
    calls = sum(map(is_call, model.graph.node))
    if calls:
        attach_function(model)
    context.log.counts["attach_function"] = calls
    return inline_states(model)
