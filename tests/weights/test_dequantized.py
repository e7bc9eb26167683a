"""Quantized weights are dequantized on their way to a bundle, in stripes, to the values of the loaded model."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_models import case, tensors_of, write_case

from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.exporting import prepare as preparing
from gqa_export.exporting import weight_store
from gqa_export.exporting.options import ExportOptions
from gqa_export.progress import silent
from gqa_export.quantized.matrix import QuantizedMatrix, Stripe
from gqa_export.weights.memory_budget import Budget
from gqa_export.weights.source_kinds import DequantizedSource

WIDE = {"feed_forward_length": 64, "expert_feed_forward_length": 32}


@pytest.mark.parametrize(("name", "stored"), [("llama", "Q4_1"), ("qwen3moe", "Q8_0")])
def test_a_quantized_file_is_exported_without_loading_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
                                                         stored: str) -> None:
    architecture, keys, _ = case(name)
    keys = {**keys, **{key: size for key, size in WIDE.items() if key in keys}}
    path = write_case(tmp_path / "model.gguf", name, keys, tensors_of(architecture, keys, {}),
                      stored=gguf.GGMLQuantizationType[stored])
    checkpoint = open_checkpoint(path)
    state = load_model(checkpoint, "fp32").state_dict()

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(weight_store, "load_model", refuse)
    ready = preparing.prepare(checkpoint, ExportOptions(target="ort", capacity=16, trace_cache=False), silent, Budget())
    wanted = weight_store.wanted_weights(ready.traced)
    assert sum(isinstance(ready.store.sources[name], DequantizedSource) for name in wanted) >= 7
    for each in wanted:
        found = b"".join(bytes(chunk) for chunk in ready.store.sources[each].chunks())
        assert found == state[each].numpy().tobytes(), each


def test_transposed_experts_come_as_the_model_has_them() -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (6, 4)).astype(np.int8)
    matrix = QuantizedMatrix((2, 3, 4), 4, 4, "int", "none", "test", lambda start, stop: Stripe(
        codes[start:stop], np.ones((stop - start, 1), np.float32)), transposed=True)
    source = DequantizedSource(matrix)
    assert source.shape == (2, 4, 3)
    found = np.frombuffer(b"".join(bytes(chunk) for chunk in source.chunks()), np.float32).reshape(source.shape)
    np.testing.assert_array_equal(found, codes.reshape(2, 3, 4).swapaxes(1, 2))
