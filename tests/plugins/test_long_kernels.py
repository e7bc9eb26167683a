"""The kernels for long prompts against fp64, through the interpreter, with their own selection handed to the reference.

The yardstick is eager attention over the same keys: products in the case's precision plus the logarithm of each key's
weight, softmax in fp32, weights rounded, products again. Small leaves, so that few tokens have several segments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from attention_cases import DTYPES, SMALL, Case, Problem, assert_guards, guarded, make
from gqa_plugins.grouped_attention import long_attend, long_launch, long_reference, long_selection
from gqa_plugins.grouped_attention.long_attend import LongTables

from gqa_export import long_attention_op as contract
from gqa_export.long_attention_op import LongSetting

pytestmark = pytest.mark.kernels

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


def run(case: Case, setting: LongSetting, handed: torch.Tensor | None = None, problem: Problem | None = None) -> Ran:
    """Append, score, select and long_prefill; outputs and workspace begin as NaN, or as numbers that no index is."""
    from gqa_plugins.grouped_attention import append

    problem = problem or make(case)
    tables, guards = tables_of(setting, case.kv_heads, case.head), problem.guards
    tables = LongTables(*(guarded(t, guards) for t in (tables.fractions, tables.projections, tables.code_order)))
    rotated = append.append(*problem.tensors()[:9], num_heads=case.heads, interleaved=case.interleaved)
    output = guarded(torch.full((len(case.lengths), case.steps, case.heads * case.value_head), torch.nan,
                                dtype=DTYPES[case.dtype]), guards)
    sizes = long_launch.scratch_elements(setting, batch=len(case.lengths), steps=case.steps, capacity=case.capacity,
                                         kv_heads=case.kv_heads, group=case.heads // case.kv_heads)
    workspace = (guarded(torch.full((sizes[0],), 1 << 30, dtype=torch.int32), guards),
                 guarded(torch.full((sizes[1],), torch.nan), guards))
    selection = long_attend.attend_long(
        rotated, problem.past_key, problem.past_value, problem.past_lengths, problem.new_lengths, problem.sinks,
        tables, output, num_heads=case.heads, scale=case.head**-0.5, softcap=case.softcap, setting=setting,
        dtype=case.dtype, capability=80, handed=handed, tiles=SMALL, workspace=workspace)
    return Ran(problem, setting, tables, output, selection)


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


CASES = {
    "a prompt of several leaves": Case(((0, 135),), 135, capacity=144, heads=3, kv_heads=1),
    "ragged, over a past, one brings nothing": Case(((0, 66), (45, 33), (64, 0), (31, 40)), 66, capacity=96, heads=4,
                                                    kv_heads=1, head=24, value_head=40, sinks=True),
    "from a leaf's border to another": Case(((64, 64), (32, 32)), 64, capacity=128, heads=2, kv_heads=2, softcap=5.0),
    "fp16, head size 64, a group of 7": Case(((0, 97),), 97, capacity=100, heads=7, kv_heads=1, head=64, value_head=64,
                                             dtype="fp16"),
    "fp16, head size 128": Case(((5, 75),), 75, capacity=96, heads=4, kv_heads=2, head=128, value_head=128,
                                dtype="fp16"),
    "bf16": Case(((40, 60), (0, 66)), 66, capacity=110, heads=4, kv_heads=2, head=32, value_head=32, dtype="bf16"),
    "few tokens far into a cache": Case(((130, 3), (97, 2)), 3, capacity=160, heads=3, kv_heads=1),
}


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_as_close_to_fp64_as_twice_eager(name: str, method: str) -> None:
    ran = run(CASES[name], SETTINGS[method])
    assert_as_close_as_twice_eager(ran)


@pytest.mark.parametrize("setting", [
    replace(TILES, leaf=96, heavy_keys=48, tile=48, block=24, samples=7, anchors=30),
    replace(TILES, leaf=96, heavy_keys=96, tile=32, block=96), replace(TILES, anchors=0, samples=1),
    replace(HYPER, anchors=0), replace(HYPER, heavy_keys=32, samples=40, leaf=16)], ids=str)
def test_other_settings_are_as_close(setting: LongSetting) -> None:
    assert_as_close_as_twice_eager(run(Case(((0, 110), (97, 30)), 110, capacity=128, heads=2, kv_heads=1), setting))


def test_voters_of_a_large_group_take_several_programs() -> None:
    case = Case(((20, 40),), 40, capacity=64, heads=20, kv_heads=1)
    assert long_launch.vote_parts(TILES, 20) == 2
    assert_as_close_as_twice_eager(run(case, TILES))


@pytest.mark.parametrize("method", SETTINGS)
def test_the_selection_is_the_reference_s(method: str) -> None:
    """In fp32 from fp64; no seed here has a near tie, of which an implementation may turn either way."""
    case, setting = Case(((37, 70), (64, 9)), 70, capacity=112, heads=4, kv_heads=2), SETTINGS[method]
    ran = run(case, setting)
    tables = long_selection.Tables(*(t.double() if t.is_floating_point() else t.long()
                                     for t in vars(ran.tables).values()))
    own = long_selection.Setting(**setting.attributes())
    for b, (past, new) in enumerate(case.lengths):
        query = ran.problem.query[b, :new].double().view(new, 2, 2, case.head).permute(1, 2, 0, 3)
        wanted = long_selection.select(query, ran.problem.past_key[b, :, : past + new].double(), past, new, own,
                                       long_selection.Scores(case.head**-0.5, 0.0), tables)
        got = selection_of(ran, b)
        if method == "tiles":
            for place, blocks in (wanted.tiles or {}).items():
                assert torch.equal(got.tiles[place], blocks), place
            assert wanted.tiles
        else:
            assert torch.equal(got.key_places[:, : past + new], wanted.key_places)
            assert torch.equal(got.query_places[..., :new], wanted.query_places)


@pytest.mark.parametrize("method", SETTINGS)
def test_a_selection_that_is_handed_over_is_computed_with(method: str) -> None:
    case = Case(((3, 100),), 100, capacity=112, heads=2, kv_heads=1, seed=1)
    other = run(replace(case, seed=2), SETTINGS[method]).selection.clone()
    own = run(case, SETTINGS[method])
    handed = run(case, SETTINGS[method], handed=other)
    assert torch.equal(handed.selection, other)
    assert (handed.output - own.output).abs().max() > 1e-3, "it was not used"
    assert_as_close_as_twice_eager(handed)


@pytest.mark.parametrize("setting", [
    replace(TILES, leaf=128), replace(TILES, heavy_keys=96), replace(TILES, samples=96), replace(HYPER, leaf=128),
    replace(HYPER, heavy_keys=64), replace(HYPER, samples=64)], ids=str)
def test_full_coverage_is_exact_attention(setting: LongSetting) -> None:
    case = Case(((0, 110),), 110, capacity=112, heads=2, kv_heads=1, sinks=True)
    ran = run(case, setting)
    everything = replace(ran, setting=replace(TILES, leaf=128))
    assert (ran.output.double() - dense(everything, torch.float64)).abs().max() <= 1e-6


@pytest.mark.parametrize("method", SETTINGS)
def test_chunks_that_end_at_leaves_give_what_one_piece_gives(method: str) -> None:
    whole = run(Case(((0, 100),), 100, capacity=112, heads=2, kv_heads=1), SETTINGS[method])
    second = make(Case(((64, 36),), 36, capacity=112, heads=2, kv_heads=1))
    second.query.copy_(whole.problem.query[:, 64:])
    second.key.copy_(whole.problem.key[:, 64:])
    second.value.copy_(whole.problem.value[:, 64:])
    for name in ("past_key", "past_value"):
        getattr(second, name).copy_(getattr(whole.problem, name))
        getattr(second, name)[:, :, 64:] = torch.nan
    assert (run(second.case, SETTINGS[method], problem=second).output - whole.output[:, 64:]).abs().max() <= 1e-6


@pytest.mark.parametrize("method", SETTINGS)
def test_lengths_that_do_not_fit_give_nan_rows_and_touch_nothing(method: str) -> None:
    problem = make(Case(((0, 40), (60, 40), (0, 99), (-1, 3)), 40, capacity=64, heads=2, kv_heads=1))
    ran = run(problem.case, SETTINGS[method], problem=problem)
    assert_guards(problem.guards)
    assert ran.output[0].isfinite().all()
    assert ran.output[1].isnan().all()
    assert ran.output[2].isnan().all()
    assert ran.output[3, :3].isnan().all()
    assert (ran.output[3, 3:] == 0).all()
