"""RMS norms into ONNX Runtime's fused ones, by onnxscript's rules: x / rms(x) * w, and with the residual addition.

Gemma's (1 + w) is a norm whose scale is computed; ONNX Runtime folds that addition when it loads. What no rule
recognises stays as it is: slower, equally right. Passes over an onnx_ir Model whose weights are detached.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ...graph.passes import NearMiss, Rewritten
from ...graph.rules import narrowed
from ..context import Context
from ..norm_pattern import norms_left

if TYPE_CHECKING:
    import onnx_ir
    from onnxscript.rewriter import RewriteRule

NORM = "SimplifiedLayerNormalization"


def fuse_norms(model: onnx_ir.Model, context: Context) -> Rewritten:
    """x / sqrt(mean(x^2) + e) * w -> SimplifiedLayerNormalization."""
    from onnxscript.rewriter.ort_fusions.rms_normalization import rms_normalization_ruleset

    count = narrowed(rms_normalization_ruleset.rules).apply_to_model(model)
    return Rewritten(count, norms_left(_View(model, rms_normalization_ruleset.rules)))


class _View:
    """An onnx_ir model as `norm_pattern` looks at it; `rules` say why they do not match."""

    def __init__(self, model: onnx_ir.Model, rules: Sequence[RewriteRule]) -> None:
        self._model, self._rules = model, rules

    def nodes(self) -> Iterable[onnx_ir.Node]:
        return [node for node in self._model.graph if any(self.readers(node)) or any(
            value.is_graph_output() for value in node.outputs)]

    def op(self, node: onnx_ir.Node) -> str:
        return f"{node.domain}::{node.op_type}" if node.domain else node.op_type

    def name(self, node: onnx_ir.Node) -> str:
        return node.name or ""

    def makers(self, node: onnx_ir.Node) -> list[onnx_ir.Node]:
        makers = [value.producer() for value in node.inputs if value is not None]
        return [maker for maker in makers if maker is not None]

    def readers(self, node: onnx_ir.Node) -> list[onnx_ir.Node]:
        return [use.node for value in node.outputs for use in value.uses()]

    def why_not(self, node: onnx_ir.Node) -> NearMiss:
        return _reason(self._model, node, self._rules)


def _reason(model: onnx_ir.Model, node: onnx_ir.Node, rules: Sequence[RewriteRule]) -> NearMiss:
    """Where and why the rules do not match at a node, in their own words: those of the rule that came furthest."""
    matches = [match for rule in rules if (match := rule.match(model, model.graph, node)) is not None and match.reason]
    place, reason = node.name or node.outputs[0].name or "", "a constant, a type or a shape is not that of the pattern"
    if matches:
        best = max(matches, key=lambda match: len(match.nodes))
        reason = " ".join(best.reason.split())
        place = next((found.name for found in best.failure_nodes_and_values if found.name), place)
    return NearMiss(place, reason)


def settle_types(model: onnx_ir.Model, context: Context) -> int:
    """Make the fused norms of low precision models well typed: the rule looks through the Casts around a norm.

    The fused op's result has its scale's type. x is cast to that type (Gemma's fp32 scale: the norm stays fp32); a
    result that was wider before is cast back, unless all it met was the Cast to the scale's type. Counts the norms.
    """
    import onnx_ir as ir

    count = 0
    for norm in _norms(model):
        x, scale, out = norm.inputs[0], norm.inputs[1], norm.outputs[0]
        assert x is not None
        assert scale is not None
        assert scale.dtype is not None
        wanted, before = scale.dtype, out.dtype
        if x.dtype != wanted:
            norm.replace_input_with(0, _cast(norm, x, wanted, after=False))
        if before != wanted:
            out.type = ir.TensorType(wanted)
            users = [use.node for use in out.uses()]
            casts = [node for node in users if node.op_type == "Cast" and node.attributes["to"].as_int() == wanted]
            rest = [use for use in out.uses() if use.node not in casts]
            for cast in casts:
                ir.convenience.replace_all_uses_with(cast.outputs[0], out)
            if rest:
                assert before is not None
                wide = _cast(norm, out, before, after=True)
                for use in rest:
                    use.node.replace_input_with(use.idx, wide)
        count += x.dtype != wanted or before != wanted
    return count


def norms_of_one_type(model: onnx_ir.Model, context: Context) -> list[NearMiss]:
    """The fused norms whose input and scale differ in type: there must be none."""
    types = [(norm, [value.dtype if value is not None else None for value in norm.inputs[:2]])
             for norm in _norms(model)]
    return [NearMiss(norm.name or norm.outputs[0].name or "", f"its input is {x}, its scale {scale}")
            for norm, (x, scale) in types if x != scale]


def _norms(model: onnx_ir.Model) -> list[onnx_ir.Node]:
    return [node for node in model.graph if node.op_type == NORM]


def _cast(norm: onnx_ir.Node, value: onnx_ir.Value, dtype: onnx_ir.DataType, *, after: bool) -> onnx_ir.Value:
    import onnx_ir as ir

    assert norm.graph is not None
    name = f"{_module(norm)}/{'Widen' if after else 'Cast'}_x"
    cast = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
    cast.outputs[0].name, cast.outputs[0].shape = f"{name}.0", value.shape
    cast.outputs[0].type = ir.TensorType(dtype)
    (norm.graph.insert_after if after else norm.graph.insert_before)(norm, cast)
    return cast.outputs[0]


def fuse_skip_norms(model: onnx_ir.Model, context: Context) -> Rewritten:
    """norm(x + skip), the sum still in use -> com.microsoft::SkipSimplifiedLayerNormalization."""
    from onnxscript.rewriter.ort_fusions.skip_normalization import skip_rms_normalization_ruleset

    count = narrowed(skip_rms_normalization_ruleset.rules).apply_to_model(model)
    misses = []
    for node in model.graph:
        if node.op_type == "SkipSimplifiedLayerNormalization":
            for value in node.outputs[1:3]:
                value.name = ""
        elif node.op_type == NORM and node.inputs[0] is not None and _op_of(node.inputs[0].producer()) == "Add":
            miss = _reason(model, node, skip_rms_normalization_ruleset.rules)
            misses.append(NearMiss(node.name or node.outputs[0].name or "",
                                   f"it is not fused with the Add before it: {miss.reason} ({miss.node})"))
    return Rewritten(count, tuple(misses))


def _op_of(node: onnx_ir.Node | None) -> str:
    return node.op_type if node is not None else ""


def clean(model: onnx_ir.Model, context: Context) -> int:
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


def names_are_unique(model: onnx_ir.Model, context: Context) -> list[NearMiss]:
    """The nodes without a name of their own: there must be none."""
    seen: set[str] = set()
    misses = []
    for node in model.graph:
        if not node.name or node.name in seen:
            misses.append(NearMiss(node.name or "", "its name is missing or taken"))
        seen.add(node.name or "")
    return misses


def _module(node: onnx_ir.Node) -> str:
    for value in reversed(node.inputs):
        if value is None:
            continue
        maker = value.producer()
        name = (value if maker is None else maker).name or ""
        if maker is not None and maker.op_type != "Constant" and "/" in name:
            if len(value.shape or ()) == 1:
                return name.rpartition("/")[0]
        elif maker is None and "." in name:
            return name.rpartition(".")[0]
    return "graph"
