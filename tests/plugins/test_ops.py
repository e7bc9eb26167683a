"""The public entry and the two torch ops: in place and functional, compiled, differentiated, on both backends."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from attention_cases import DTYPES, Case, assert_close_as_eager, assert_guards, make, truth
from gqa_plugins.grouped_attention import attend, backward, grouped_query_attention, ops, plan
from refusal import refused

RAGGED = Case(((30, 2), (0, 3), (7, 0)), 3, sinks=True, rotary=8, window=20, softcap=9.0)


def call(entry, problem, **changes):
    case = problem.case
    query, key, value, past_key, past_value, past_lengths, new_lengths, cos, sin, sinks = problem.tensors()
    arguments = {**case.attributes, "new_lengths": new_lengths, "cos": cos, "sin": sin, "sinks": sinks,
                 "rotary_interleaved": case.interleaved, **changes}
    return entry(query, key, value, past_key, past_value, past_lengths, **arguments)


@pytest.mark.kernels
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("entry", [grouped_query_attention, attend], ids=["in-place", "functional"])
def test_entry_agrees_with_fp64_on_both_backends(entry, backend: str) -> None:
    problem = make(RAGGED)
    before = problem.past_key.clone(), problem.past_value.clone()
    expected = truth(problem)
    output, key, value = call(entry, problem, backend=backend)
    in_place = entry is grouped_query_attention
    assert (key.data_ptr() == problem.past_key.data_ptr()) == in_place
    for b, (past, new) in enumerate(RAGGED.lengths):
        # fp32 rotation rounds twice: two ulps of values of size up to 4.
        assert (key[b, :, :past + new].double() - expected[1][b, :, :past + new]).abs().amax() <= 4 * 2**-22
        assert torch.equal(value[b, :, :past + new].double(), expected[2][b, :, :past + new])
    problem.past_key.copy_(before[0])
    problem.past_value.copy_(before[1])
    if not in_place:
        assert_guards(problem.guards)
    assert_close_as_eager(output, problem)


@pytest.mark.kernels
def test_layer_that_reads_another_layers_cache_writes_nothing() -> None:
    """Key and value absent, rotated query: equal to the call that wrote the cache."""
    problem = make(Case(((30, 2), (4, 3)), 3, rotary=8))
    written, key, value = call(grouped_query_attention, problem)
    before = key.clone()
    problem.key = problem.value = None
    output, _, _ = call(grouped_query_attention, problem)
    assert torch.equal(output, written)
    assert torch.equal(key.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))
    assert value is problem.past_value


@pytest.mark.kernels
def test_absent_new_lengths_mean_every_token_and_strided_queries_are_taken() -> None:
    problem = make(Case(((3, 4), (9, 4)), 4, dtype="fp16"))
    expected, _, _ = call(attend, problem)
    packed = torch.stack((problem.query, problem.query), dim=-1)
    problem.query = packed[..., 0]
    assert not problem.query.is_contiguous()
    output, _, _ = call(attend, problem, new_lengths=None)
    assert torch.equal(output, expected)


@pytest.mark.kernels
@pytest.mark.parametrize("steps", [1, 4])
def test_absent_new_lengths_launch_nothing_more(monkeypatch, steps: int) -> None:
    """No tensor is filled for them: that would be a launch more at every call, in a captured graph too."""
    made: list[str] = []

    class Counting:
        def __getattr__(self, name: str) -> object:
            if name in ("full", "ones", "zeros", "tensor", "arange", "full_like"):
                made.append(name)
            return getattr(torch, name)

    monkeypatch.setattr(ops, "torch", Counting())
    problem = make(Case(((3, steps), (9, steps)), steps))
    output, key, value = call(grouped_query_attention, problem, new_lengths=None)
    assert made == []
    again = make(problem.case)
    expected, expected_key, expected_value = call(grouped_query_attention, again)
    assert torch.equal(output, expected)
    assert torch.equal(key.nan_to_num(nan=7.0), expected_key.nan_to_num(nan=7.0))
    assert torch.equal(value.nan_to_num(nan=7.0), expected_value.nan_to_num(nan=7.0))


@pytest.mark.kernels
def test_host_bound_changes_the_programs_but_not_the_result(monkeypatch) -> None:
    problem = make(Case(((700, 1), (0, 1)), 1, capacity=1024, kv_heads=1))
    chosen, original = [], plan.plan

    def record(**arguments):
        chosen.append(original(**arguments))
        return chosen[-1]

    monkeypatch.setattr(plan, "plan", record)
    outputs = [call(attend, problem, max_length=bound)[0] for bound in (None, 701)]
    assert [one.programs for one in chosen] == [8, 4]
    # The same fp32 terms in another order; 701 weights that sum to 1, values of size up to 4.
    assert (outputs[0] - outputs[1]).abs().max() <= 8 * 4 * 2**-23


@pytest.mark.kernels
def test_batch_or_step_count_of_zero_gives_an_empty_output() -> None:
    for batch, steps in ((0, 1), (2, 0)):
        cache = [torch.zeros(batch, 2, 8, 16) for _ in range(2)]
        new = torch.zeros(batch, steps, 32)
        output, _, _ = grouped_query_attention(torch.zeros(batch, steps, 64), new, new, *cache,
                                               torch.zeros(batch, dtype=torch.int32), num_heads=4, kv_num_heads=2,
                                               scale=1.0)
        assert output.shape == (batch, steps, 64)


@pytest.mark.parametrize("entry", [grouped_query_attention, attend], ids=["in-place", "functional"])
def test_compiled_call_equals_the_plain_one(entry) -> None:
    problem, again = make(RAGGED), make(RAGGED)
    plain = call(entry, problem, backend="reference")
    compiled = torch.compile(lambda p: call(entry, p, backend="reference"), backend="aot_eager", fullgraph=True)
    for one, other in zip(plain, compiled(again), strict=True):
        assert torch.equal(one.nan_to_num(nan=7.0), other.nan_to_num(nan=7.0))


def op_arguments(dtype: torch.dtype, **changes) -> tuple:
    problem = make(Case(((5, 2), (0, 3)), 3, heads=4, kv_heads=2, head=4, value_head=3, capacity=9, rotary=2,
                        sinks=True, **changes))
    # Finite everywhere: these checks compare whole tensors, unspecified parts too.
    tensors = [t.nan_to_num(nan=0.5).to(dtype) if t is not None and t.is_floating_point() else t
               for t in problem.tensors()]
    tensors[9] = tensors[9].clamp(min=-3.0)  # finite differences of exp(-inf) mean nothing
    case = problem.case
    return (*tensors, case.heads, case.kv_heads, 0.5, case.softcap, case.window, False, 9, "reference")


def test_ops_keep_the_rules_of_torch_library() -> None:
    torch.library.opcheck(torch.ops.gqa_kernels.attend_in_place.default, op_arguments(torch.float32))
    arguments = list(op_arguments(torch.float32))
    for index in (0, 1, 2, 3, 4, 9):
        arguments[index] = arguments[index].clone().requires_grad_()
    torch.library.opcheck(torch.ops.gqa_kernels.attend.default, tuple(arguments))


@pytest.mark.parametrize("block", [2**26, 1], ids=["one block", "a row at a time"])
@pytest.mark.parametrize("changes", [{}, {"window": 3, "softcap": 2.0}], ids=["plain", "window and softcap"])
def test_gradients_equal_finite_differences_in_fp64(monkeypatch, changes: dict, block: int) -> None:
    monkeypatch.setattr(backward, "BLOCK_SCORES", block)
    arguments = list(op_arguments(torch.float64, **changes))
    places = (0, 1, 2, 3, 4, 9)

    def run(*leaves):
        for place, leaf in zip(places, leaves, strict=True):
            arguments[place] = leaf
        output, key, value = ops.attend(*arguments)
        return output, key * 0.5, value

    leaves = [arguments[place].clone().requires_grad_() for place in places]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_nothing_unspecified_reaches_a_gradient() -> None:
    """NaN in padded rows and in the cache's tail; a sequence that does not fit gives no gradient, not NaN."""
    problem = make(Case(((5, 2), (0, 0), (30, 1)), 3, capacity=32))
    leaves = [problem.query, problem.key, problem.value, problem.past_key, problem.past_value]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    problem.query, problem.key, problem.value, problem.past_key, problem.past_value = leaves
    output, _, _ = call(attend, problem, backend="reference")
    output.square().sum().backward()
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
        assert leaf.grad[0].abs().sum() > 0
        assert (leaf.grad[1] == 0).all()
    leaf = leaves[0].detach().clone().requires_grad_()
    problem.query = leaf
    problem.past_lengths[2] = 32
    output, _, _ = call(attend, problem, backend="reference", max_length=32)
    assert output[2, 0].isnan().all()
    output[:2].sum().backward()
    assert (leaf.grad[2] == 0).all()


def test_gradient_of_the_rotary_table_is_refused() -> None:
    problem = make(RAGGED)
    problem.cos.requires_grad_()
    output, _, _ = call(attend, problem, backend="reference")
    with pytest.raises(NotImplementedError, match="cos and sin"):
        output.sum().backward()


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_through_the_kernels_equal_those_through_the_reference(dtype: str) -> None:
    """The backward pass recomputes: it never sees the forward's rounding, so the two are the same numbers."""
    gradients = []
    for backend in ("triton", "reference"):
        problem = make(Case(((5, 2),), 2, dtype=dtype, sinks=True))
        problem.query = problem.query.clone().requires_grad_()
        call(attend, problem, backend=backend)[0].float().sum().backward()
        gradients.append(problem.query.grad)
    assert torch.equal(*gradients)


def test_entry_in_place_refuses_lengths_and_leaves_the_cache_untouched() -> None:
    problem = make(Case(((63, 1), (3, 1)), 1))
    problem.past_lengths[0] = 64
    before = problem.past_key.clone()
    with refused("E-RUN-ARGUMENT"):
        call(grouped_query_attention, problem, backend="reference")
    assert torch.equal(problem.past_key.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = ("import sys, gqa_plugins.grouped_attention as g, gqa_plugins.grouped_attention.plan\n"
               "assert not {'torch', 'triton', 'numpy'} & set(sys.modules), 'heavy'\n"
               "import gqa_plugins.grouped_attention.api, gqa_plugins.grouped_attention.ops\n"
               "assert 'triton' not in sys.modules, 'triton'\n"
               "try:\n    g.nonsense\nexcept AttributeError as error:\n    print(error)\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "has no attribute 'nonsense'" in done.stdout
