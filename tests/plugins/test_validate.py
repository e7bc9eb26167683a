"""Every refusal of the entry: named argument, shapes in the message, before any launch. No kernel runs here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gqa_plugins.grouped_attention import api, ops, validate
from refusal import refused

from gqa_export.errors import GqaExportError

B, S, C, H, K, D, E = 2, 3, 16, 4, 2, 8, 12


def call(**changes: Any) -> dict[str, Any]:
    """Arguments of a valid call, with changes."""
    given: dict[str, Any] = {
        "query": torch.zeros(B, S, H * D), "key": torch.zeros(B, S, K * D), "value": torch.zeros(B, S, K * E),
        "past_key": torch.zeros(B, K, C, D), "past_value": torch.zeros(B, K, C, E),
        "past_lengths": torch.tensor([1, 2], dtype=torch.int32), "new_lengths": torch.tensor([3, 0], dtype=torch.int32),
        "cos": torch.zeros(C, D // 2), "sin": torch.zeros(C, D // 2), "sinks": torch.zeros(H),
        "num_heads": H, "kv_num_heads": K, "scale": 1.0}
    return {**given, **changes}


@pytest.fixture(autouse=True)
def no_launch(monkeypatch):
    """A refusal must come before anything runs."""

    def refuse(*arguments):
        raise AssertionError("launched in spite of a bad argument")

    monkeypatch.setattr(ops, "attend_in_place", refuse)
    monkeypatch.setattr(ops, "attend", refuse)


BAD = [
    ("num_heads", {"num_heads": 5}, "5 query heads"),
    ("num_heads", {"num_heads": 0}, "0 query heads"),
    ("num_heads", {"kv_num_heads": 0}, "kv_num_heads = 0"),
    ("scale", {"scale": float("nan")}, "not a finite number"),
    ("softcap", {"softcap": -1.0}, "-1.0"),
    ("softcap", {"softcap": float("inf")}, "inf"),
    ("window", {"window": -1}, "-1"),
    ("key", {"key": None}, "absent"),
    ("value", {"value": None}, "absent"),
    ("cos", {"cos": None}, "absent"),
    ("sin", {"sin": None}, "absent"),
    ("sinks", {"sinks": [0.0] * H}, "list"),
    ("query", {"query": torch.zeros(B, S, H * D, dtype=torch.float64)}, "float64"),
    ("query", {"query": torch.zeros(B, S, H * D, dtype=torch.int32)}, "int32"),
    ("key", {"key": torch.zeros(B, S, K * D, dtype=torch.float16)}, "query is torch.float32"),
    ("past_value", {"past_value": torch.zeros(B, K, C, E, dtype=torch.bfloat16)}, "bfloat16"),
    ("past_lengths", {"past_lengths": torch.tensor([1, 2])}, "int64"),
    ("new_lengths", {"new_lengths": torch.tensor([1.0, 2.0])}, "expected torch.int32"),
    ("past_key", {"past_key": torch.zeros(B, K, C, D, device="meta")}, "on meta"),
    ("query", {"query": torch.zeros(B * S, H * D)}, "[6, 32] has 2 dimensions"),
    ("query", {"query": torch.zeros(B, S, H * D + 1)}, "[2, 3, 33], expected [B, S, H*D] = [2, 3, 32]"),
    ("past_key", {"past_key": torch.zeros(B, C, D)}, "3 dimensions"),
    ("past_value", {"past_value": torch.zeros(B * K, C, E)}, "3 dimensions"),
    ("past_key", {"past_key": torch.zeros(B + 1, K, C, D)}, "[3, 2, 16, 8], expected [B, K, C, D] = [2, 2, 16, 8]"),
    ("past_value", {"past_value": torch.zeros(B, K, C + 1, E)}, "[2, 2, 17, 12]"),
    ("key", {"key": torch.zeros(B, S, H * D)}, "[2, 3, 32], expected [B, S, K*D] = [2, 3, 16]"),
    ("value", {"value": torch.zeros(B, S, K * D)}, "[B, S, K*E] = [2, 3, 24]"),
    ("past_lengths", {"past_lengths": torch.zeros(3, dtype=torch.int32)}, "[3], expected [B] = [2]"),
    ("new_lengths", {"new_lengths": torch.zeros(1, dtype=torch.int32)}, "[1], expected [B] = [2]"),
    ("sinks", {"sinks": torch.zeros(K)}, "[2], expected [H] = [4]"),
    ("cos", {"cos": torch.zeros(C)}, "1 dimensions"),
    ("sin", {"sin": torch.zeros(C, 1)}, "as cos"),
    ("cos", {"cos": torch.zeros(C, D), "sin": torch.zeros(C, D)}, "does not fit head size D = 8"),
    ("cos", {"cos": torch.zeros(3, 2), "sin": torch.zeros(3, 2)}, "no row for position 3"),
    ("past_key", {"past_key": torch.zeros(B, C, K, D).transpose(1, 2)}, "not contiguous"),
    ("past_value", {"past_value": torch.zeros(B, K, 2 * C, E)[:, :, :C]}, "not contiguous"),
    ("max_length", {"max_length": C + 1}, "17 is outside 0 .. C = 16"),
    ("max_length", {"max_length": -1}, "-1 is outside"),
    ("cos", {"max_length": C, "cos": torch.zeros(9, 2), "sin": torch.zeros(9, 2)}, "[9, 2] has no row for position 15"),
    ("past_lengths", {"past_lengths": torch.tensor([1, -2], dtype=torch.int32)}, "sequence 1 has -2"),
    ("new_lengths", {"new_lengths": torch.tensor([4, 0], dtype=torch.int32)}, "sequence 0 has 4, outside 0 .. S = 3"),
    ("past_lengths", {"past_lengths": torch.tensor([14, 2], dtype=torch.int32)},
     "sequence 0: past 14 + new 3 exceeds the capacity C = 16"),
]


@pytest.mark.parametrize(("argument", "changes", "said"), BAD, ids=[f"{a}-{n}" for n, (a, _, _) in enumerate(BAD)])
@pytest.mark.parametrize("entry", [api.grouped_query_attention, api.attend], ids=["in-place", "functional"])
def test_bad_argument_is_refused_by_name_with_its_shape(entry, argument: str, changes: dict, said: str) -> None:
    with pytest.raises(GqaExportError) as caught:
        entry(**call(**changes))
    assert caught.value.what.startswith(f"{argument}:")
    assert said in caught.value.what
    assert caught.value.where == f"grouped_query_attention, argument {argument}"
    assert caught.value.fix
    assert caught.value.exit_code == 2


def test_cache_shared_between_keys_and_values_is_refused() -> None:
    cache = torch.zeros(B, K, C, D)
    with refused("E-RUN-ARGUMENT"):
        api.grouped_query_attention(**call(past_key=cache, past_value=cache, value=torch.zeros(B, S, K * D)))


def test_head_size_over_256_and_huge_capacity_are_refused_by_the_kernels_only() -> None:
    wide = call(query=torch.zeros(B, S, H * 257), key=torch.zeros(B, S, K * 257),
                past_key=torch.zeros(B, K, C, 257), cos=None, sin=None)
    with refused("E-RUN-ARGUMENT"):
        api.grouped_query_attention(**wide)
    attributes = {name: wide.pop(name) for name in ("num_heads", "kv_num_heads", "scale")}
    sizes = validate.check(*wide.values(), **attributes, softcap=0.0, window=0, max_length=None, reference=True)
    assert sizes == validate.Dimensions(B, S, C, H, K, 257, E, 0)
    meta = {"device": "meta"}
    for shape, said in (((1, 1, 2**24, 128), "past_key: capacity 16777216 times head size 128"),
                        ((70000, 1, 1, 8), "query: B = 70000")):
        batch, _, _, size = shape
        tensors = (torch.zeros(batch, 1, size, **meta), None, None, torch.zeros(shape, **meta),
                   torch.zeros(*shape[:3], 8, **meta), torch.zeros(batch, dtype=torch.int32, **meta))
        with pytest.raises(GqaExportError) as caught:
            validate.check(*tensors, None, None, None, None, num_heads=1, kv_num_heads=1, scale=1.0, softcap=0.0,
                           window=0, max_length=1)
        assert caught.value.what.startswith(said)


def test_a_million_positions_are_within_the_limits() -> None:
    meta = {"device": "meta", "dtype": torch.bfloat16}
    sizes = validate.check(torch.zeros(1, 1, 8192, **meta), None, None, torch.zeros(1, 8, 2**20, 256, **meta),
                           torch.zeros(1, 8, 2**20, 256, **meta), torch.zeros(1, device="meta", dtype=torch.int32),
                           None, None, None, None, num_heads=32, kv_num_heads=8, scale=1.0, softcap=0.0, window=0,
                           max_length=2**20)
    assert sizes.C == 2**20


def test_unknown_backend_and_cpu_without_interpreter_are_refused(monkeypatch) -> None:
    with refused("E-OPTION-BACKEND"):
        api.grouped_query_attention(**call(backend="cudnn"))
    monkeypatch.delenv("TRITON_INTERPRET")
    with refused("E-ENV-NO-GPU") as caught:
        api.grouped_query_attention(**call())
    assert 'backend="reference"' in caught.error.fix
    assert api.choose_backend(torch.device("cpu"), "reference") == "reference"
    assert api.choose_backend(torch.device("cuda"), None) == "triton"


def test_gradient_through_the_in_place_entry_is_refused() -> None:
    with refused("E-RUN-GRADIENT") as caught:
        api.grouped_query_attention(**call(query=torch.zeros(B, S, H * D, requires_grad=True)))
    assert "attend" in caught.error.fix


def test_given_a_bound_lengths_are_never_read(monkeypatch) -> None:
    def read(*arguments):
        raise AssertionError("lengths were read")

    seen = []
    monkeypatch.setattr(validate, "check_lengths", read)
    monkeypatch.setattr(ops, "attend_in_place", lambda *arguments: seen.append(arguments[-5:]))
    api.grouped_query_attention(**call(max_length=9))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    api.grouped_query_attention(**call())
    assert seen == [(9, "triton", False, 0.0, 0.0), (C, "triton", False, 0.0, 0.0)]
