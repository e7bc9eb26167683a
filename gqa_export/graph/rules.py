"""onnxscript's rewrite rules, with constants compared exactly, each tried only at the nodes where its pattern can end.

Exactly: onnxscript takes a constant for a pattern's literal if it is near it (1e-5 relative, 1e-8 absolute), so that
its rule for `x + 0` removes the epsilon of `x + 1e-8`, and its rule for `x * 1` removes a factor of 1 + 1e-6. Here a
constant matches if it is the literal, rounded to the constant's own type.

Only where it can end: onnxscript tries every rule at every node, and nearly every try fails at the first comparison, of
op types: a tenth of the time in which a small model is exported. Here that comparison comes before everything else.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from importlib.metadata import version
from typing import Any

import numpy as np

from ..errors import GqaExportError, cause_of


def narrowed(rules: Iterable[Any]) -> Any:
    """A RewriteRuleSet of `rules`, in their order, as this module's text says. The rules themselves stay as they are.

    Raises GqaExportError where onnxscript is built otherwise than this module knows: with its rules as they are,
    constants would be lost without a word.
    """
    from onnxscript.rewriter import RewriteRuleSet

    try:
        return RewriteRuleSet([_narrowed(rule) for rule in rules])
    except (AttributeError, IndexError, ImportError, TypeError) as error:
        raise _unknown(error) from error


def usual_rules() -> Any:
    """The rules that onnxscript's `rewrite` applies when it is given none, narrowed. Raises as `narrowed`."""
    from onnxscript import rewriter

    try:
        return narrowed(rewriter._DEFAULT_REWRITE_RULES)
    except AttributeError as error:
        raise _unknown(error) from error


def _unknown(error: Exception) -> GqaExportError:
    return GqaExportError(f"this onnxscript ({version('onnxscript')}) keeps its rewrite rules in another form: "
                          f"{cause_of(error)}", "onnxscript.rewriter",
                          "install the version that constraints.txt names", code="E-ENV-ONNXSCRIPT")


def _narrowed(rule: Any) -> Any:
    last = rule._target_pattern.output_nodes[0].op  # a pattern is matched from its (first) output backwards
    ends_at = last.matches
    quick = copy(rule)
    quick._matcher = _exact(rule._matcher)
    try_rewrite = quick.try_rewrite

    def try_where_it_may_match(model: Any, graph: Any, node: Any, **options: Any) -> Any:
        return try_rewrite(model, graph, node, **options) if ends_at(node.op_type) else None

    quick.try_rewrite = try_where_it_may_match
    return quick


def _exact(matcher: Any) -> Any:
    """The same matcher, but a constant matches a literal of the pattern only if it is that very number."""
    from onnxscript.rewriter._pattern_ir import Constant

    strict, near = copy(matcher), matcher._match_constant.__func__

    def match_constant(pattern: Any, value: Any) -> bool:
        return bool(near(strict, Constant(_rounded(pattern.value, value), 0.0, 0.0), value))

    strict._match_constant = match_constant
    return strict


def _rounded(literal: Any, value: Any) -> Any:
    """A pattern's number (or list of numbers) as the constant's own type holds it: 1/3 is another number in fp32."""
    if value.const_value is None:
        return literal
    dtype = value.const_value.numpy().dtype
    if dtype.kind in "iub":
        return literal
    return np.asarray(literal, np.float64).astype(dtype).astype(np.float64).tolist()
