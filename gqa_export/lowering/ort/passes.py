"""Target `ort`: the contributed ops of ONNX Runtime, as its own model builder uses them.

RMS norms fused with the residual addition, rotary inside GroupQueryAttention, projections packed or on the matrices
as stored, lengths from the mask in five nodes. What a pattern misses stays standard ops; a layer GroupQueryAttention
cannot hold stays the canonical op, whose function then comes with the model.
"""

from __future__ import annotations

import onnx

from ...graph.passes import Pass
from .. import attention_function, head_axes, state_functions
from ..attention_calls import only_fallbacks_are_left
from ..context import Context
from ..rotary import fold
from ..state_calls import fused_states
from . import attention, matmul, norms, position_guard, states

PREPARE = [
    Pass("fuse_norms", norms.fuse_norms, requires=("infer_shapes",)),
    Pass("settle_types", norms.settle_types, requires=("fuse_norms",), ensures=norms.norms_of_one_type),
    Pass("fuse_skip_norms", norms.fuse_skip_norms, requires=("settle_types",)),
    Pass("name_fused", norms.clean, requires=("fuse_norms", "fuse_skip_norms"), ensures=norms.names_are_unique),
]


PASSES = [
    Pass("silu", matmul.silu),
    Pass("norms_before_transposes", head_axes.norms_before_transposes, requires=("fuse_norms",)),
    Pass("rotary_inside", fold.fold_rotary, requires=("norms_before_transposes",)),
    Pass("unreshape", head_axes.unreshape, requires=("norms_before_transposes", "rotary_inside")),
    Pass("lower_attention", attention.lower_attention, expect=attention.holdable, requires=("rotary_inside",),
         ensures=only_fallbacks_are_left),
    Pass("lower_states", states.lower_states, expect=fused_states),
    Pass("transposed_products", matmul.transposed_products),
    Pass("packed_projections", matmul.pack_projections, requires=("lower_attention", "transposed_products")),
    Pass("lean_guard", position_guard.lean_guard, expect=lambda context: 1),
]


def finish(model: onnx.ModelProto, context: Context) -> onnx.ModelProto:
    """Add the function that layers which fell back still call; write the bodies of the state ops that are left."""
    if any(attention_function.is_call(node) for node in model.graph.node):
        attention_function.attach_function(model)
    return state_functions.inline(model)
