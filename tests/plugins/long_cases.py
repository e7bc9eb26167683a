"""Long prompts for the kernels: small settings, tables, the definition in any precision, what is allowed.

The yardstick is eager attention over the same keys: products in the case's precision plus the logarithm of each key's
weight, softmax in fp32, weights rounded, products again. Small leaves, so that few tokens have several segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from attention_cases import DTYPES, Problem, assert_guards
from gqa_plugins.grouped_attention import long_reference, long_selection
from gqa_plugins.grouped_attention.long_attend import LongTables

from gqa_export import long_attention_op as contract
from gqa_export.long_attention_op import LongSetting

TILES = LongSetting("tiles", leaf=32, heavy_keys=16, samples=12, anchors=3, tile=16, block=8, score_rows=4,
                    exact_steps=2)
HYPER = LongSetting("hyper", leaf=32, heavy_keys=8, samples=12, anchors=3, exact_steps=2)
SETTINGS = {"tiles": TILES, "hyper": HYPER}


@dataclass
class Ran:
    """A case with what the kernels made of it."""

    problem: Problem
    setting: LongSetting
    tables: LongTables
    output: torch.Tensor
    selection: torch.Tensor


def tables_of(setting: LongSetting, kv_heads: int, head: int, seed: int = 0) -> LongTables:
    return LongTables(torch.tensor(contract.fractions(seed, 0, kv_heads, setting.samples), dtype=torch.int32),
                      torch.tensor(contract.projections(seed, 0, head)).float(),
                      torch.tensor(contract.code_order(), dtype=torch.int32))


def selection_of(ran: Ran, b: int) -> long_selection.Selection:
    """What the kernels selected for one sequence."""
    case, setting = ran.problem.case, long_selection.Setting(**ran.setting.attributes())
    past, new = case.lengths[b]
    return long_selection.unpacked(ran.selection[b].long(), past, new, case.steps, case.capacity,
                                   case.heads // case.kv_heads, setting)


def dense(ran: Ran, dtype: torch.dtype) -> torch.Tensor:
    """The op by its definition, with the kernels' selection, in fp64 or as eager attention of another precision."""
    case, setting = ran.problem.case, long_selection.Setting(**ran.setting.attributes())
    tables = long_selection.Tables(*(t.double() if t.is_floating_point() else t.long()
                                     for t in vars(ran.tables).values()))
    group = case.heads // case.kv_heads
    output = torch.zeros(len(case.lengths), case.steps, case.heads * case.value_head, dtype=dtype)
    for b, (past, new) in enumerate(case.lengths):
        if not new:
            continue
        total = past + new
        query = ran.problem.query[b, :new].to(dtype).view(new, case.kv_heads, group, case.head).permute(1, 2, 0, 3)
        key, value = (x[b, :, None, :total].to(dtype) for x in (ran.problem.past_key, ran.problem.past_value))
        weights = torch.cat([long_reference.log_weights(leaf, total, setting, tables, selection_of(ran, b), group)
                             for leaf in long_selection.leaves(past, new, setting.leaf)], 2)
        scores = query @ key.transpose(-1, -2) * case.head**-0.5
        if case.softcap:
            scores = torch.tanh(scores / case.softcap) * case.softcap
        scores = scores + weights.to(dtype)
        if ran.problem.sinks is not None:
            sink = ran.problem.sinks.to(dtype).view(case.kv_heads, group, 1, 1).expand(-1, -1, new, 1)
            scores = torch.cat((scores, sink), -1)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        shares = torch.softmax(scores, -1, dtype=wide).to(dtype)[..., :total]
        output[b, :new] = (shares @ value).permute(2, 0, 1, 3).reshape(new, -1)
    return output


def assert_as_close_as_twice_eager(ran: Ran) -> None:
    expected = dense(ran, torch.float64)
    error = (ran.output.double() - expected).abs().max().item()
    eager = (dense(ran, DTYPES[ran.problem.case.dtype]).double() - expected).abs().max().item()
    assert error <= 2 * eager + 1e-6, f"error {error:.3g}, eager's {eager:.3g}"
    for b, (_, new) in enumerate(ran.problem.case.lengths):
        assert (ran.output[b, new:] == 0).all(), f"a padded row of sequence {b} is not zero"
    assert_guards(ran.problem.guards)
