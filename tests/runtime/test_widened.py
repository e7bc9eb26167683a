"""A model in fp64 that shares its matrices: the same numbers as one whose weights were cast, and half of its memory."""

from __future__ import annotations

import copy
from collections.abc import Callable

import gqa_models
import numpy as np
import pytest
import torch
from torch.nn import functional

from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.runtime import widened as module
from gqa_export.runtime.torch_session import TorchSession
from gqa_export.runtime.widened import Widened, linear, widened

IDS = np.arange(12)[None] + 5
FAMILIES = ("llama", "gemma2", "gpt_oss", "gpt2", "llama4", "qwen3_next", "lfm2", "deepseek_v3")
"""plain, scaled embeddings, experts with biases, Conv1D, experts chosen by index, linear attention, convolutions,
latents"""


@pytest.fixture
def built(tmp_path) -> Callable[[str], torch.nn.Module]:
    """A tiny random model by its name, loaded as a comparison loads it."""
    return lambda name: load_model(open_checkpoint(gqa_models.write_tiny(name, tmp_path / name)), "float32")


@pytest.fixture(autouse=True)
def _everything_is_shared(monkeypatch) -> None:
    monkeypatch.setattr(module, "SMALLEST", 1)
    monkeypatch.setattr(module, "BLOCK", 1 << 12)  # the larger matrices of tiny models are cast in several pieces


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_model_computes_what_one_with_cast_weights_computes(family, built) -> None:
    model = built(family)
    shared = TorchSession(model, 64, "fp64")
    cast = TorchSession(copy.deepcopy(model).to(torch.float64), 64, "fp64")
    assert any(isinstance(p, Widened) for p in shared.model.parameters())
    assert not any(isinstance(p, Widened) for p in cast.model.parameters())
    for ids in (IDS, IDS[:, :1]):
        expected, got = (session.step(ids, want_cache=True) for session in (cast, shared))
        assert got.logits.dtype == np.float64
        # the same products in fp64, in blocks: another order of summation at most; one value rounded to fp32 on the way
        # would show as 1e-8
        for one, other in zip((expected.logits, *expected.keys, *expected.values),
                              (got.logits, *got.keys, *got.values), strict=True):
            assert np.abs(one - other).max() <= 1e-13 * max(1.0, np.abs(one).max())


def test_the_matrices_are_shared_and_small_parameters_are_not(built) -> None:
    model = built("llama")
    made = widened(model)
    for (name, own), (_, other) in zip(model.named_parameters(), made.named_parameters(), strict=True):
        assert other.dtype == torch.float64
        assert (own.data_ptr() == other.data_ptr()) == (own.dim() > 1), name
    assert made.get_input_embeddings().weight is not model.get_input_embeddings().weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_tied_parameters_stay_tied() -> None:
    layer = torch.nn.ModuleDict({"in": torch.nn.Embedding(30, 20), "out": torch.nn.Linear(20, 30, bias=False)})
    layer["out"].weight = layer["in"].weight
    made = widened(layer)
    assert made["out"].weight is made["in"].weight


def test_new_values_of_one_model_do_not_reach_the_other() -> None:
    """A quantized bundle's reference gets its matrices that way, in fp64."""
    model = torch.nn.Linear(20, 30, bias=False)
    made, before = widened(model), model.weight.detach().clone()
    third = torch.full((30, 20), 1 / 3, dtype=torch.float64)
    made.weight.data = third
    assert torch.equal(made(torch.ones(1, 20, dtype=torch.float64)), torch.nn.functional.linear(
        torch.ones(1, 20, dtype=torch.float64), third))
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("change", [lambda p: p.mul_(2), lambda p: p.__setitem__(0, 1.0), lambda p: p.t().zero_(),
                                    lambda p: torch.nn.init.zeros_(p)])
def test_a_shared_matrix_is_never_changed_in_place(change) -> None:
    model = torch.nn.Linear(20, 30)
    before = model.weight.detach().clone()
    with torch.no_grad(), pytest.raises(TypeError, match="cannot be changed in place"):
        change(widened(model).weight)
    assert torch.equal(model.weight, before)


CALLS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "linear by name": lambda w, x, b: functional.linear(input=x, weight=w, bias=b),
    "linear without a bias": lambda w, x, b: functional.linear(input=x, weight=w),
    "linear, half by name": lambda w, x, b: functional.linear(x, weight=w, bias=b),
    "the matrix times itself": lambda w, x, b: functional.linear(w, w),
    "the matrix as rows": lambda w, x, b: functional.linear(weight=x, input=w),
    "addmm": lambda w, x, b: torch.addmm(input=b, mat1=x, mat2=w.t()),
    "addmm to the matrix": lambda w, x, b: torch.addmm(input=w, mat1=x.new_ones(30, 2), mat2=x.new_ones(2, 20)),
    "matmul": lambda w, x, b: torch.matmul(input=w, other=x.t()),
    "transposed by name": lambda w, x, b: torch.transpose(input=w, dim0=0, dim1=1) @ b,
    "einsum": lambda w, x, b: torch.einsum("nk,tk->tn", w, x),
    "embedding": lambda w, x, b: functional.embedding(input=torch.tensor([3, 7]), weight=w),
    "stacked": lambda w, x, b: torch.cat(tensors=[w, x]),
    "sum": lambda w, x, b: torch.sum(input=w, dim=0),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_by_name_computes_in_fp64_too(call: str) -> None:
    weight = widened(torch.nn.Linear(20, 30)).weight
    assert isinstance(weight, Widened)
    values, bias = torch.randn(5, 20, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    got, expected = (CALLS[call](each, values, bias) for each in (weight, weight.double()))
    assert got.dtype == torch.float64
    # sums of up to 30 terms of size 1 in fp64; fp32 anywhere on the way would show as 1e-7
    assert (got - expected).abs().max() < 1e-13


@pytest.mark.parametrize("change", [lambda p: torch.relu_(input=p), lambda p: torch.nn.init.normal_(tensor=p),
                                    lambda p: torch.add(p, 1.0, out=p), lambda p: torch.neg(input=p.double(), out=p)])
def test_a_call_by_name_changes_no_shared_matrix(change: Callable[[torch.Tensor], object]) -> None:
    model = torch.nn.Linear(20, 30)
    before = model.weight.detach().clone()
    with torch.no_grad(), pytest.raises(TypeError, match="cannot be changed in place"):
        change(widened(model).weight)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("call", [lambda w: functional.linear(weight=w), lambda w: functional.linear(w),
                                  lambda w: functional.linear(w, w, inputs=w),
                                  lambda w: functional.linear(w, w, weight=w),
                                  lambda w: functional.linear(w, w, None, w)])
def test_a_call_that_torch_refuses_is_refused(call: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(TypeError):
        call(widened(torch.nn.Linear(20, 30)).weight)


def test_a_copy_of_a_shared_model_has_memory_of_its_own() -> None:
    made = widened(torch.nn.Linear(20, 30))
    again = copy.deepcopy(made)
    assert isinstance(again.weight, Widened)
    assert again.weight.data_ptr() != made.weight.data_ptr()
    assert torch.equal(again(torch.ones(20, dtype=torch.float64)), made(torch.ones(20, dtype=torch.float64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [3, 700])
def test_a_product_in_blocks_is_the_whole_product(dtype, rows) -> None:
    weight, values = torch.randn(rows, 24).to(dtype), torch.randn(2, 5, 24, dtype=torch.float64)
    bias = torch.randn(rows, dtype=torch.float64)
    expected = torch.nn.functional.linear(values, weight.double(), bias)
    # sums of 24 terms in fp64, grouped as the number of columns suggests
    assert (linear(values, weight, bias) - expected).abs().max() < 1e-14 * 24


def test_what_a_matrix_says_of_itself_reads_no_value() -> None:
    weight = widened(torch.nn.Linear(20, 30)).weight
    assert (weight.shape, weight.dtype, weight.numel(), weight.dim()) == ((30, 20), torch.float64, 600, 2)
    assert weight.untyped_storage().nbytes() == 600 * 4
    assert isinstance(weight.t(), Widened)
    assert not isinstance(weight.float(), Widened)
