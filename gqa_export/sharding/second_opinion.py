"""transformers' own tensor-parallel plan held against ours: a matrix that both cut must be cut the same way, and one
that it cuts must not stay whole here.

`base_model_tp_plan` names modules and how each is cut, for about a hundred architectures. It cuts experts inside, or by
number (then it says so elsewhere), and keeps packed matrices whole where it gathers them: neither contradicts ours.
"""

from __future__ import annotations

import re

import onnx

from ..errors import UnsupportedModel
from .plan import FIX, Plan

ROWS, SUMS = "colwise", "rowwise"
"""how a matrix [out, in] is cut: its rows are outputs; its columns are summed over"""


def cut_of(plan: Plan, weight: str) -> str:
    """How a weight is cut here: ROWS, SUMS, "experts" or "whole"."""
    cut = plan.cuts.get(weight)
    if cut is None:
        return "whole"
    if len(plan.view.shape(weight)) > 2:
        return "experts"
    turned = any(node.op_type == "Transpose" for node in plan.view.read_by.get(weight, ()))
    return ROWS if (cut.axis == 0) == turned else SUMS


def refuse_disagreement(plan: Plan, theirs: dict[str, str]) -> None:
    """Compare the plans.

    Raises:
        UnsupportedModel: they disagree on a matrix; names it, and why ours stays whole where it does.
    """
    wanted = [(re.compile(r"(?:\w+\.)?" + re.escape(name).replace(r"\*", r"\d+")), how) for name, how in theirs.items()
              if how in (ROWS, SUMS)]
    for name in plan.view.initializers:
        if plan.view.initializers[name].data_location != onnx.TensorProto.EXTERNAL or not name.endswith(".weight") \
                or len(plan.view.shape(name)) != 2:
            continue
        module = name.removesuffix(".weight")
        for pattern, how in wanted:
            if not pattern.fullmatch(module):
                continue
            ours = cut_of(plan, name)
            if ours != how and name not in plan.shared:
                why = f" ({plan.whole[name]})" if name in plan.whole else ""
                raise UnsupportedModel(f"transformers' plan for tensor parallel cuts {module} {how}, here it is {ours}"
                                       f"{why}", name, FIX, code="E-MODEL-SHARD-PLAN")
