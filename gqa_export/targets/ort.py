"""Target `ort`: the contributed ops of ONNX Runtime, as its own model builder uses them.

RMS norms fused with the residual addition, rotary inside GroupQueryAttention, projections packed or on the matrices
as stored, lengths from the mask in five nodes. What a pattern misses stays standard ops; a layer GroupQueryAttention
cannot hold stays the canonical op, whose function then comes with the model.
"""

from __future__ import annotations

from typing import Any

import onnx

from .. import cache_io
from ..graph.passes import Pass
from . import body, ort_attention, ort_guard, ort_layout, ort_matmul, ort_norms, rotary_fold

PREPARE = [
    Pass("fuse_norms", ort_norms.fuse_norms),
    Pass("settle_types", ort_norms.settle_types),
    Pass("fuse_skip_norms", ort_norms.fuse_skip_norms),
    Pass("name_fused", ort_norms.clean),
]


def note_element(graph: Any, context: Any) -> int:
    """Note the model's float type for the passes that follow."""
    model = context.notes["model"]
    context.notes["element"] = next(value.type.tensor_type.elem_type for value in model.graph.output
                                    if value.name == cache_io.LOGITS)
    return 1


PASSES = [
    Pass("note_element", note_element, expect=lambda context: 1),
    Pass("silu", ort_matmul.silu),
    Pass("norms_before_transposes", ort_layout.norms_before_transposes),
    Pass("rotary_inside", rotary_fold.fold_rotary),
    Pass("unreshape", ort_layout.unreshape),
    Pass("lower_attention", ort_attention.lower_attention, expect=ort_attention.holdable),
    Pass("transposed_products", ort_matmul.transposed_products),
    Pass("packed_projections", ort_matmul.pack_projections),
    Pass("lean_guard", ort_guard.lean_guard, expect=lambda context: 1),
]


def finish(model: onnx.ModelProto, context: Any) -> onnx.ModelProto:
    """Add the function that layers which fell back still call."""
    if any(body.is_call(node) for node in model.graph.node):
        body.attach_function(model)
    return model
