"""The function body of `gqa::LongGroupedQueryAttention` in ONNX Runtime against the reference, its selection too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from gqa_plugins.grouped_attention import long_reference
from onnx import inliner
from refusal import refused

from gqa_export import long_attention_op as contract
from gqa_export.errors import UnsupportedModel
from gqa_export.long_attention_op import LongSetting
from gqa_export.lowering import long_function
from lowering.one_long_op import model, session, tables

H, K, D, E = 6, 2, 16, 8
SMALL = {"hyper": LongSetting("hyper", leaf=64, heavy_keys=16, samples=16, anchors=3, exact_steps=2),
         "tiles": LongSetting("tiles", leaf=64, heavy_keys=16, samples=16, anchors=3, tile=16, block=8, score_rows=4,
                              exact_steps=2),
         "published": LongSetting("hyper", leaf=64, heavy_keys=16, samples=16, anchors=0, exact_steps=2)}


def feeds(pasts: list[int], news: list[int], capacity: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs with garbage wherever nothing is specified. capacity: of a static cache."""
    random = np.random.default_rng(seed)
    batch, new, past = len(pasts), max(news), capacity or max(pasts)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    given = {"query": 1.5 * normal(batch, new, H * D), "key": normal(batch, new, K * D),
             "value": normal(batch, new, K * E), "past_key": normal(batch, K, past, D),
             "past_value": normal(batch, K, past, E), "past_lengths": np.array(pasts, np.int32),
             "new_lengths": np.array(news, np.int32), "sinks": np.linspace(-2, 2, H, dtype=np.float32)}
    for b in range(batch):
        for name in ("query", "key", "value"):
            given[name][b, news[b]:] = np.nan
        for name in ("past_key", "past_value"):
            given[name][b, :, pasts[b]:] = np.nan
    return given


def by_reference(given: dict[str, np.ndarray], setting: LongSetting, *, softcap: float = 0.0, window: int = 0,
                 growing: int = 1, handed: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    wide = {name: torch.from_numpy(x).double() if x.dtype == np.float32 else torch.from_numpy(x)
            for name, x in {**given, **tables(setting, K, D)}.items()}
    return long_reference.long_grouped_query_attention(
        **wide, cos=None, sin=None, num_heads=H, kv_num_heads=K, scale=D**-0.5, softcap=softcap, window=window,
        rotary_interleaved=0, growing=growing, **setting.attributes(), handed=handed)


CALLS = {"prompt": ([0], [330]), "full leaves": ([0], [256]), "one over": ([0], [65]), "ragged": ([0, 0], [330, 170]),
         "chunks": ([128, 70, 300], [70, 130, 5]), "a row brings none": ([0, 200], [200, 0])}


@pytest.mark.parametrize("growing", [1, 0])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", SMALL)
def test_onnx_runtime_computes_what_the_reference_does(name: str, call: str, growing: int) -> None:
    setting, (pasts, news) = SMALL[name], CALLS[call]
    given = feeds(pasts, news, 0 if growing else 512)
    output, key, value, selection = session(model(setting, H, K, D, E, growing=growing)).run(
        None, {**given, **tables(setting, K, D)})
    ours = by_reference(given, setting, growing=growing)
    agree = (torch.from_numpy(selection) == ours[3]).double().mean()
    assert agree >= 0.999, f"{agree:.4f} of the selection is the reference's"
    handed = by_reference(given, setting, growing=growing, handed=torch.from_numpy(selection))
    assert np.abs(output - handed[0].numpy()).max() <= 5e-6
    for b, (past, new) in enumerate(zip(pasts, news)):
        assert np.array_equal(key[b, :, : past + new], handed[1][b, :, : past + new].float().numpy())
        assert np.array_equal(value[b, :, : past + new], handed[2][b, :, : past + new].float().numpy())


ODD = {"hyper, leaves of one": LongSetting("hyper", leaf=1, heavy_keys=512, samples=3, anchors=1, exact_steps=0),
       "hyper, more of all than there are keys": LongSetting("hyper", leaf=32, heavy_keys=512, samples=900, anchors=9),
       "tiles, more of all than there are keys": LongSetting("tiles", leaf=32, heavy_keys=800, samples=900, anchors=9,
                                                             tile=32, block=4),
       "tiles, nothing a power of two": LongSetting("tiles", leaf=36, heavy_keys=9, samples=7, anchors=0, tile=6,
                                                    block=3, score_rows=1, exact_steps=1),
       "tiles, blocks of one": LongSetting("tiles", leaf=5, heavy_keys=3, samples=1, anchors=2, tile=5, block=1,
                                           score_rows=5, exact_steps=0)}


@pytest.mark.parametrize("call", ["prompt", "ragged", "chunks"])
@pytest.mark.parametrize("name", ODD)
def test_odd_settings(name: str, call: str) -> None:
    given, setting = feeds(*CALLS[call]), ODD[name]
    output, *_, selection = session(model(setting, H, K, D, E)).run(None, {**given, **tables(setting, K, D)})
    handed = by_reference(given, setting, handed=torch.from_numpy(selection) if selection.shape[2] else None)
    assert np.abs(output - handed[0].numpy()).max() <= 5e-6
    if "than there are keys" in name and call == "prompt":  # nothing is left out: the keys of a leaf and all before
        exact = by_reference(given, replace(setting, exact_steps=1 << 20))
        assert np.abs(output - exact[0].numpy()).max() <= 5e-6


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("attributes", [{"softcap": 3.0}, {"window": 40}], ids=str)
def test_soft_cap_and_window(name: str, attributes: dict[str, Any]) -> None:
    given, setting = feeds([0], [300]), SMALL[name]
    output = session(model(setting, H, K, D, E, **attributes)).run(None, {**given, **tables(setting, K, D)})
    wanted = by_reference(given, setting, **attributes, handed=torch.from_numpy(output[3])
                          if "softcap" in attributes else None)
    assert np.abs(output[0] - wanted[0].numpy()).max() <= 5e-6
    assert (output[3].shape[2] == 0) == ("window" in attributes)


@pytest.mark.parametrize("name", SMALL)
def test_calls_of_few_tokens_are_exact_and_select_nothing(name: str) -> None:
    given, setting = feeds([300, 100], [2, 1]), SMALL[name]
    output, *_, selection = session(model(setting, H, K, D, E)).run(None, {**given, **tables(setting, K, D)})
    assert np.abs(output - by_reference(given, setting)[0].numpy()).max() <= 5e-6
    assert selection.shape == (2, K, 0)


@pytest.mark.parametrize("name", SMALL)
def test_a_sequence_past_the_capacity_is_nan(name: str) -> None:
    given, setting = feeds([0, 0], [300, 100], capacity=300), SMALL[name]
    given["past_lengths"][0] = 1
    output = session(model(setting, H, K, D, E, growing=0)).run(None, {**given, **tables(setting, K, D)})[0]
    assert np.isnan(output[0]).all()
    assert np.isfinite(output[1]).all()


@pytest.mark.parametrize("opset", [18, 21, 23])
@pytest.mark.parametrize("name", SMALL)
def test_the_body_is_sound_at_every_opset_and_can_be_inlined(name: str, opset: int) -> None:
    made = model(SMALL[name], H, K, D, E, opset=opset)
    onnx.checker.check_model(made)
    flat = inliner.inline_local_functions(made)
    onnx.checker.check_model(flat)
    given = {**feeds([0], [200]), **tables(SMALL[name], K, D)}
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in
               zip(session(made).run(None, given), session(flat).run(None, given)))


def test_function_has_the_inputs_outputs_and_attributes_in_order() -> None:
    function = long_function.function_proto(23, long_function.Variant(False, True, False))
    assert (function.domain, function.name) == (contract.DOMAIN, contract.OP)
    assert tuple(function.input) == contract.INPUT_NAMES
    assert tuple(function.output) == contract.OUTPUT_NAMES
    assert tuple(function.attribute) == contract.ATTRIBUTE_NAMES


def test_one_body_for_two_methods_is_refused() -> None:
    made = model(SMALL["hyper"], H, K, D, E)
    other = made.graph.node.add()
    other.CopyFrom(made.graph.node[0])
    next(a for a in other.attribute if a.name == "method").i = contract.METHODS["tiles"]
    with refused("E-GRAPH-LONG", UnsupportedModel):
        long_function.attach_long_function(made)


def test_a_call_without_its_tables_is_refused() -> None:
    made = model(replace(SMALL["hyper"]), H, K, D, E)
    made.graph.node[0].input[10] = ""
    with refused("E-GRAPH-CALL", UnsupportedModel):
        long_function.attach_long_function(made)
