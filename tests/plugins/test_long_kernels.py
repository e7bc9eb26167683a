"""The kernels for long prompts against fp64, in the interpreter; their own selection is handed to the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import DTYPES, SMALL, Case, Problem, assert_guards, guarded, make
from gqa_plugins.grouped_attention import long_attend, long_launch, long_selection
from gqa_plugins.grouped_attention.long_attend import LongTables
from long_cases import (
    HYPER,
    SETTINGS,
    TILES,
    Ran,
    assert_as_close_as_twice_eager,
    dense,
    selection_of,
    tables_of,
)

from gqa_export.long_attention_op import LongSetting

pytestmark = pytest.mark.kernels


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


@pytest.mark.parametrize(("name", "method"), [
    *((name, "tiles") for name in CASES), *((name, "hyper") for name in CASES if "border" not in name)])
def test_kernels_are_as_close_to_fp64_as_twice_eager(name: str, method: str) -> None:
    ran = run(CASES[name], SETTINGS[method])
    assert_as_close_as_twice_eager(ran)


@pytest.mark.parametrize("setting", [
    replace(TILES, leaf=96, heavy_keys=48, tile=48, block=24, samples=7, anchors=30),
    replace(TILES, leaf=96, heavy_keys=96, tile=32, block=96), replace(TILES, anchors=0, samples=1),
    replace(HYPER, anchors=0), replace(HYPER, heavy_keys=32, samples=40, leaf=16)], ids=str)
def test_other_settings_are_as_close(setting: LongSetting) -> None:
    assert_as_close_as_twice_eager(run(Case(((0, 100), (97, 20)), 100, capacity=120, heads=2, kv_heads=1), setting))


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
    case = Case(((3, 70),), 70, capacity=80, heads=2, kv_heads=1, seed=1)
    other = run(replace(case, seed=2), SETTINGS[method]).selection.clone()
    own = run(case, SETTINGS[method])
    handed = run(case, SETTINGS[method], handed=other)
    assert torch.equal(handed.selection, other)
    assert (handed.output - own.output).abs().max() > 1e-3, "it was not used"
    assert_as_close_as_twice_eager(handed)


@pytest.mark.parametrize("setting", [
    replace(TILES, heavy_keys=96), replace(TILES, samples=96), replace(HYPER, heavy_keys=64),
    replace(HYPER, samples=64)], ids=str)
def test_full_coverage_is_exact_attention(setting: LongSetting) -> None:
    case = Case(((0, 90),), 90, capacity=96, heads=2, kv_heads=1, sinks=True)
    ran = run(case, setting)
    everything = replace(ran, setting=replace(TILES, leaf=128))  # one leaf holds all of them
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
