"""Target `portable`: the canonical model with the op's body attached, whole models against transformers in fp64."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from gqa_export import attention_op
from gqa_export.lowering import attention_function

from .attention_only import AttentionOnly
from .one_op import Attributes
from .whole_model import Decoder, canonical, eager, lowered, truth, with_weights

LOGIT_ATOL = 1e-4
"""fp32 against fp64 through 3 to 4 layers of width 64 and logits up to 6: some 100 roundings of 2^-24 * 6, and the
residual stream amplifies them up to tenfold; the smallest of the mutations tried moves logits by 1e-2"""


@pytest.mark.parametrize(("name", "mode"), [("llama", "growing"), ("gemma2", "static")])
def test_ragged_chunked_decoding_equals_transformers(name, mode):
    module, (_, spec) = eager(name), canonical(name, mode)
    decoder = Decoder(with_weights(lowered(name, "portable", mode).model, module), spec, mode, batch=3)
    if mode == "static":
        for cache in decoder.past.values():
            cache[:] = np.nan  # beyond the lengths anything may lie
    assert_decodes(decoder, module, spec)


def assert_decodes(decoder: Decoder, module, spec) -> None:
    """Ragged prefill, a ragged chunk over a past, three single steps: each row like that row alone."""
    random = np.random.default_rng(7)
    rows = [random.integers(0, spec.vocabulary, 17).tolist() for _ in range(3)]
    expected = [truth(module, row)[0] for row in rows]
    done = [0, 0, 0]
    for counts in ([9, 4, 6], [2, 5, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]):
        logits = decoder.step([row[at: at + count] for row, at, count in zip(rows, done, counts)])
        for b, count in enumerate(counts):
            np.testing.assert_allclose(logits[b, :count], expected[b][done[b]: done[b] + count], atol=LOGIT_ATOL)
            done[b] += count


def test_lowering_attaches_one_function_and_changes_no_call():
    model, spec = canonical("llama")
    result = lowered("llama", "portable")
    calls = [node for node in result.model.graph.node if attention_function.is_call(node)]
    assert len(calls) == len(spec.layers) == result.counts["attach_function"]
    assert [function.name for function in result.model.functions] == [attention_op.OP]
    assert not result.fallbacks
    assert not model.functions, "the canonical model is not touched"


def test_checker_accepts_it_in_full_once_the_weights_are_in():
    filled = with_weights(lowered("llama", "portable").model, eager("llama"))
    onnx.checker.check_model(filled, full_check=True)
    assert (attention_function.opset_of(filled), filled.ir_version) == (18, 8)


def test_inlined_it_needs_no_function_and_gives_the_same_logits():
    module, (_, spec) = eager("llama"), canonical("llama")
    model = with_weights(lowered("llama", "portable").model, module)
    flat = attention_function.inline(model)
    assert not flat.functions
    assert {entry.domain for entry in flat.opset_import} == {""}
    rows = [[5, 6, 7], [8, 9]]
    first, second = (Decoder(form, spec, "growing", batch=2).step(rows) for form in (model, flat))
    np.testing.assert_array_equal(first, second)


def test_onnx_reference_evaluator_runs_the_model():
    from onnx.reference import ReferenceEvaluator

    module, (_, spec) = eager("llama"), canonical("llama")
    model = with_weights(lowered("llama", "portable").model, module)
    feeds = {"input_ids": np.array([[3, 4, 5], [6, 7, 0]]), "attention_mask": np.array([[1, 1, 1], [1, 1, 0]]),
             **Decoder(model, spec, "growing", batch=2).past}
    logits = ReferenceEvaluator(model).run(["logits"], feeds)[0]
    np.testing.assert_allclose(logits[0], truth(module, [3, 4, 5])[0], atol=LOGIT_ATOL)
    np.testing.assert_allclose(logits[1, :2], truth(module, [6, 7])[0], atol=LOGIT_ATOL)


def test_left_padding_gives_nan_logits_for_that_row_alone():
    module, (_, spec) = eager("llama"), canonical("llama")
    decoder = Decoder(with_weights(lowered("llama", "portable").model, module), spec, "growing", batch=2)
    logits = decoder.step([[0, 1, 2], [3, 4, 5]], np.array([[0, 1, 1], [1, 1, 1]]))
    assert np.isnan(logits[0]).all()
    assert not np.isnan(logits[1]).any()


def test_fp16_cache_and_weights_keep_their_type():
    model = AttentionOnly(Attributes(window=3), "portable", dtype=np.float16)
    ids, past, new = np.array([[1, 2, 3]]), np.array([0]), np.array([3])
    cache = model.empty_cache(1, 0)
    outputs = model.run(cache, past, ids, new)
    assert {output.dtype for output in outputs} == {np.dtype(np.float16)}
    expected, _ = model.expected(cache, past, ids, new)
    np.testing.assert_allclose(outputs[0], expected[0], rtol=2.0 ** -10, atol=2e-6)
