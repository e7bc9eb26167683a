"""Target `ort`: the contributed ops of ONNX Runtime, as its own model builder uses them.

RMS norms fused with the residual addition, rotary inside GroupQueryAttention, projections packed or on the matrices
as stored, lengths from the mask in five nodes. What a pattern misses stays standard ops; a layer GroupQueryAttention
cannot hold stays the canonical op, whose function then comes with the model.
"""

from __future__ import annotations

import onnx

from ...graph.passes import Pass
from .. import attention_function, head_axes
from ..context import Context
from ..rotary import fold
from . import attention, matmul, norms, position_guard

PREPARE = [
    Pass("fuse_norms", norms.fuse_norms),
    Pass("settle_types", norms.settle_types),
    Pass("fuse_skip_norms", norms.fuse_skip_norms),
    Pass("name_fused", norms.clean),
]


PASSES = [
    Pass("silu", matmul.silu),
    Pass("norms_before_transposes", head_axes.norms_before_transposes),
    Pass("rotary_inside", fold.fold_rotary),
    Pass("unreshape", head_axes.unreshape),
    Pass("lower_attention", attention.lower_attention, expect=attention.holdable),
    Pass("transposed_products", matmul.transposed_products),
    Pass("packed_projections", matmul.pack_projections),
    Pass("lean_guard", position_guard.lean_guard, expect=lambda context: 1),
]


def finish(model: onnx.ModelProto, context: Context) -> onnx.ModelProto:
    """Add the function that layers which fell back still call."""
    if any(attention_function.is_call(node) for node in model.graph.node):
        attention_function.attach_function(model)
    return model
