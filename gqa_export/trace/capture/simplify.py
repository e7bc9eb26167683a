"""A fresh translation made small with onnxscript's own optimizer, without a look at any weight.

Weights become graph inputs while the optimizer works: what is not a constant can neither be folded, nor merged with
an equal one, nor read. (Left as initializers, small ones are folded into copies and all-equal ones are merged.)
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir


def detach_weights(model: ir.Model, is_weight: Callable[[str], bool]) -> list[ir.Value]:
    """Turn the initializers that are weights into graph inputs, in place; returns them."""
    weights = [value for name, value in model.graph.initializers.items() if is_weight(name)]
    for value in weights:
        model.graph.initializers.pop(value.name or "")
        value.const_value = None
        model.graph.inputs.append(value)
    return weights


def simplify(model: ir.Model) -> None:
    """Fold, rewrite and clean a model whose weights are detached, in place. No common subexpressions are merged:
    that would move nodes of one layer into the scope of another (see `stamp`)."""
    from onnx_ir.passes import common
    from onnxscript import optimizer, rewriter

    from ...graph.rules import usual_rules

    rules = usual_rules()
    common.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants(model, onnx_shape_inference=True)
        rewriter.rewrite(model, rules)
    for clean in (common.RemoveUnusedNodesPass(), common.LiftConstantsToInitializersPass(
            lift_all_constants=True, size_limit=0), common.RemoveUnusedOpsetsPass(), common.OutputFixPass(),
            common.NameFixPass()):
        clean(model)


def merge_common(model: ir.Model) -> None:
    """Merge common subexpressions and drop what is unused; after stamping, and with the weights still detached."""
    from onnx_ir.passes import common

    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
