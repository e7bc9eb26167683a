"""Everything that spells the op for long prompts out agrees with `gqa_export.long_attention_op`."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gqa_plugins.grouped_attention import long_reference

import gqa_export
import gqa_export.trace.long_op
from gqa_export import attention_op, long_attention_op
from gqa_export.long_attention_op import DEFAULTS, METHODS, LongSetting

ROOT = Path(gqa_export.__file__).parent.parent
ALL = (*long_attention_op.INPUT_NAMES, *long_attention_op.ATTRIBUTE_NAMES)
B, S, P, H, K, D, E = 2, 5, 7, 6, 2, 8, 4
SETTING = LongSetting("hyper", leaf=8, heavy_keys=4, samples=4, anchors=1, tile=4, block=2, score_rows=2, exact_steps=1)


def example_inputs(device: str = "cpu") -> list[torch.Tensor | None]:
    sizes = {"B": B, "S": S, "P": P, "H": H, "K": K, "D": D, "E": E, "H*D": H * D, "K*D": K * D, "K*E": K * E,
             "m": SETTING.samples, "r": 7, "2^r": 128}
    values: list[torch.Tensor | None] = []
    for port in long_attention_op.INPUTS:
        if port.name in ("cos", "sin"):
            values.append(None)
            continue
        shape = tuple(sizes[letter] for letter in port.shape)
        values.append(torch.randn(shape, device=device) if port.type in ("T", "float32")
                      else torch.full(shape, 2, dtype=getattr(torch, port.type), device=device))
    return values


def attributes(setting: LongSetting, window: int = 0) -> list[float]:
    return [H, K, 0.5, 3.0, window, 0, 1, *setting.attributes().values()]


def test_the_op_has_those_of_the_attention_op_first() -> None:
    for name in ("INPUTS", "OUTPUTS", "ATTRIBUTES"):
        shared = getattr(attention_op, name)
        assert getattr(long_attention_op, name)[: len(shared)] == shared
    assert tuple(SETTING.attributes()) == long_attention_op.OWN_ATTRIBUTES


def test_reference_and_torch_op_have_the_inputs_and_attributes_in_order() -> None:
    parameters = inspect.signature(long_reference.long_grouped_query_attention).parameters
    assert tuple(parameters) == (*ALL, "handed")
    schema = torch.ops.gqa.long_grouped_query_attention.default._schema
    assert tuple(argument.name for argument in schema.arguments) == ALL
    assert len(schema.returns) == len(long_attention_op.OUTPUTS)
    assert not schema.is_mutable
    assert not any(argument.has_default_value() for argument in schema.arguments)


@pytest.mark.parametrize(("setting", "window"), [(SETTING, 0), (SETTING, 3), (replace(SETTING, exact_steps=16), 0),
                                             (replace(SETTING, method="tiles", exact_steps=16), 0)])
def test_fake_and_eager_give_one_shape(setting: LongSetting, window: int) -> None:
    eager, fake = (torch.ops.gqa.long_grouped_query_attention(*example_inputs(device), *attributes(setting, window))
                   for device in ("cpu", "meta"))
    assert [tuple(x.shape) for x in eager] == [tuple(x.shape) for x in fake]
    assert [x.dtype for x in eager] == [x.dtype for x in fake]


def test_tables_depend_on_seed_and_layer_alone_and_never_change() -> None:
    fractions = [[9443, 62646, 55890, 22333], [12125, 43640, 15766, 43782]]
    assert long_attention_op.fractions(0, 3, 2, 4) == fractions
    directions = torch.tensor([[0.246766807, 0.257628107, 0.703965033], [-0.686784501, 1.15474015, -0.740612767]])
    assert torch.allclose(torch.tensor(long_attention_op.projections(0, 3, 2, 3)), directions, rtol=1e-6)
    assert long_attention_op.fractions(1, 3, 2, 4) != fractions != long_attention_op.fractions(0, 4, 2, 4)
    values = torch.tensor(long_attention_op.projections(0, 0, 64, 64))
    assert abs(values.mean()) < 0.05
    assert abs(values.std() - 1) < 0.05
    drawn = [x for row in long_attention_op.fractions(0, 0, 8, 256) for x in row]
    assert min(drawn) >= 0
    assert max(drawn) < long_attention_op.STEPS
    assert abs(sum(drawn) / len(drawn) / 32768 - 1) < 0.05


def test_neighbours_in_the_order_of_codes_differ_in_one_bit() -> None:
    places = long_attention_op.code_order(5)
    assert sorted(places) == list(range(32))
    by_place = sorted(range(32), key=places.__getitem__)
    assert all((a ^ b).bit_count() == 1 for a, b in itertools.pairwise(by_place))


@pytest.mark.parametrize("leaf", [0, 1, 2, 7, 12, 255])
def test_segments_cover_everything_before_a_leaf_once(leaf: int) -> None:
    covered = sorted(k for start, count in long_attention_op.segments(leaf) for k in range(start, start + count))
    assert covered == list(range(leaf))
    assert all(start % count == 0 for start, count in long_attention_op.segments(leaf))


@pytest.mark.parametrize(("changes", "word"), [
    ({"method": "lsh"}, "lsh"), ({"leaf": 0}, "leaf"), ({"samples": 0}, "samples"), ({"anchors": -1}, "anchors"),
    ({"method": "hyper", "leaf": 96}, "power of two"), ({"method": "hyper", "heavy_keys": 384}, "power of two"),
    ({"method": "hyper", "heavy_keys": 2, "leaf": 128}, "capacity"), ({"leaf": 1000}, "multiple of tile"),
    ({"heavy_keys": 100}, "multiple of block"), ({"score_rows": 129}, "score_rows"), ({"anchors": 1025}, "anchors"),
    ({"block": 48}, "multiple of block")])
def test_a_setting_that_the_op_does_not_take_is_told(changes: dict, word: str) -> None:
    problems = replace(DEFAULTS["tiles"], **changes).problems(capacity=4096)
    assert any(word in problem for problem in problems), problems


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_are_taken(method: str) -> None:
    assert DEFAULTS[method].method == method
    assert DEFAULTS[method].problems(capacity=131072) == []


def test_the_page_has_the_tables_of_the_contract() -> None:
    spec = importlib.util.spec_from_file_location("op_tables", ROOT / "scripts" / "op_tables.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.long_attention() in script.PAGE.read_text(encoding="utf-8")
