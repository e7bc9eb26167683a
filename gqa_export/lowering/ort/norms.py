"""RMS norms into ONNX Runtime's fused ones, by onnxscript's rules: x / rms(x) * w, and with the residual addition.

Gemma's (1 + w) is a norm whose scale is computed; ONNX Runtime folds that addition when it loads. What no rule
recognises stays as it is: slower, equally right. Passes over an onnx_ir Model whose weights are detached.
"""

from __future__ import annotations

from typing import Any

from ...graph.rules import narrowed
from ..context import Context


def fuse_norms(model: Any, context: Context) -> int:
    """x / sqrt(mean(x^2) + e) * w -> SimplifiedLayerNormalization."""
    from onnxscript.rewriter.ort_fusions.rms_normalization import rms_normalization_ruleset

    return narrowed(rms_normalization_ruleset.rules).apply_to_model(model)


def settle_types(model: Any, context: Context) -> int:
    """Make the fused norms of low precision models well typed: the rule looks through the Casts around a norm.

    The fused op's result has its scale's type. x is cast to that type (Gemma's fp32 scale: the norm stays fp32); a
    result that was wider before is cast back, unless all it met was the Cast to the scale's type. Counts the norms.
    """
    import onnx_ir as ir

    count = 0
    for norm in [node for node in model.graph if node.op_type == "SimplifiedLayerNormalization"]:
        x, scale, out = norm.inputs[0], norm.inputs[1], norm.outputs[0]
        wanted, before = scale.dtype, out.dtype
        if x.dtype != wanted:
            norm.replace_input_with(0, _cast(ir, norm, x, wanted, after=False))
        if before != wanted:
            out.type = ir.TensorType(wanted)
            users = [use.node for use in out.uses()]
            casts = [node for node in users if node.op_type == "Cast" and node.attributes["to"].as_int() == wanted]
            rest = [use for use in out.uses() if use.node not in casts]
            for cast in casts:
                ir.convenience.replace_all_uses_with(cast.outputs[0], out)
            if rest:
                wide = _cast(ir, norm, out, before, after=True)
                for use in rest:
                    use.node.replace_input_with(use.idx, wide)
        count += x.dtype != wanted or before != wanted
    return count


def _cast(ir: Any, norm: Any, value: Any, dtype: Any, *, after: bool) -> Any:
    name = f"{_module(norm)}/{'Widen' if after else 'Cast'}_x"
    cast = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
    cast.outputs[0].name, cast.outputs[0].shape = f"{name}.0", value.shape
    cast.outputs[0].type = ir.TensorType(dtype)
    (norm.graph.insert_after if after else norm.graph.insert_before)(norm, cast)
    return cast.outputs[0]


def fuse_skip_norms(model: Any, context: Context) -> int:
    """norm(x + skip), the sum still in use -> com.microsoft::SkipSimplifiedLayerNormalization."""
    from onnxscript.rewriter.ort_fusions.skip_normalization import skip_rms_normalization_ruleset

    count = narrowed(skip_rms_normalization_ruleset.rules).apply_to_model(model)
    for node in model.graph:
        if node.op_type == "SkipSimplifiedLayerNormalization":
            for value in node.outputs[1:3]:
                value.name = ""
    return count


def clean(model: Any, context: Context) -> int:
    """Drop what the rules left behind and name the new nodes by the module whose weight they read."""
    from onnx_ir.passes import common

    common.RemoveUnusedNodesPass()(model)
    taken = {node.name for node in model.graph if node.name}
    count = 0
    for node in model.graph:
        if node.name and "/" in node.name:
            continue
        stem, number = f"{_module(node)}/{node.op_type}", 0
        while f"{stem}_{number}" in taken:
            number += 1
        node.name = f"{stem}_{number}"
        taken.add(node.name)
        count += 1
    return count


def _module(node: Any) -> str:
    for value in reversed(node.inputs):
        maker = value.producer() if value is not None else None
        if maker is not None and maker.op_type != "Constant" and "/" in (maker.name or ""):
            if len(value.shape or ()) == 1:
                return maker.name.rpartition("/")[0]
        elif value is not None and maker is None and "." in (value.name or ""):
            return value.name.rpartition(".")[0]
    return "graph"
