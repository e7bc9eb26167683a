"""What is known of a model without its weights."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig, conversion_mapping

from gqa_export.environment.stand_ins import CONVERSIONS
from gqa_export.trace import skeleton

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "vocab_size": 16}


@pytest.fixture
def unbuilt(monkeypatch):
    """transformers has not built its table of conversions."""
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", None)


@pytest.mark.skipif(not CONVERSIONS.applies(), reason="another transformers builds its table")
def test_every_key_of_the_table_is_a_constant_of_the_function_that_builds_it():
    build = conversion_mapping._build_checkpoint_conversion_mapping
    known = {*conversion_mapping._MODEL_TO_CONVERSION_PATTERN, *skeleton.strings_of(build.__code__)}
    table = build()
    assert len(table) > 100
    assert set(table) <= known


@pytest.mark.parametrize(("config", "converts"), [(LlamaConfig, False), (MixtralConfig, True)])
def test_the_table_is_built_where_a_model_may_be_in_it(unbuilt, config, converts):
    model = skeleton.build(config(**SIZES), torch.float32, device="meta")
    assert skeleton.converts(model) == converts
    built = conversion_mapping._checkpoint_conversion_mapping_cache is not None
    assert built == (converts or not CONVERSIONS.applies())


def test_a_conversion_that_somebody_registers_counts(unbuilt):
    model = skeleton.build(LlamaConfig(**SIZES), torch.float32, device="meta")
    renaming = conversion_mapping.WeightRenaming(source_patterns="old", target_patterns="new")
    conversion_mapping.register_checkpoint_conversion_mapping("llama", [renaming])
    try:
        assert skeleton.converts(model)
    finally:
        conversion_mapping.USER_REGISTERED_MAPPINGS.discard("llama")
