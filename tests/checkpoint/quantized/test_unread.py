"""Fields of descriptions that are not read: what changes the computation is refused by name, the rest is noted."""

from __future__ import annotations

from pathlib import Path

import pytest
from quantized_checkpoints import edit, write_quantized
from refusal import refused

from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.errors import UnsupportedModel

from .test_compressed_tensors import entry, packed
from .test_gptq_awq import awq, gptq
from .test_gptq_awq import entry as gptq_entry


def transforms(*places: str, **scheme: object) -> dict:
    applied = [{"targets": ["re:.*down_proj$"], "location": place, "inverse": False, "ignore": []} for place in places]
    return {"config_groups": {"R4": {"type": "hadamard", "apply": applied, "randomize": False, **scheme}}}


def test_transforms_of_what_goes_through_layers_are_refused_and_those_in_the_weights_are_read(tmp_path: Path) -> None:
    write_quantized(tmp_path, entry("pack-quantized"), packed(4), num_hidden_layers=1)
    for fields in ({}, None, {"config_groups": {}}, transforms("weight_input", "weight_output")):
        edit(tmp_path, quantization_config={**entry("pack-quantized"), "transform_config": fields})
        assert open_checkpoint(tmp_path).notes == ()
    for place in ("input", "output", "attn_q", "attn_k", "another"):
        fields = transforms("weight_input", place)
        edit(tmp_path, quantization_config={**entry("pack-quantized"), "transform_config": fields})
        with refused("E-MODEL-QUANTIZED", UnsupportedModel) as refusal:
            open_checkpoint(tmp_path)
        assert f"transform_config at {place}" in refusal.error.what
    for unknown in ({"config_groups": {"R1": {"type": "hadamard"}}}, {"rotations": 3}, ["hadamard"]):
        edit(tmp_path, quantization_config={**entry("pack-quantized"), "transform_config": unknown})
        with refused("E-MODEL-QUANTIZED", UnsupportedModel) as refusal:
            open_checkpoint(tmp_path)
        assert "an unknown place" in refusal.error.what


def test_transforms_of_a_model_with_plain_weights_are_refused_too(tmp_path: Path) -> None:
    fields = {**entry("dense"), "transform_config": transforms("input")}
    write_quantized(tmp_path, fields, packed(4), keep=("",), num_hidden_layers=1)
    with refused("E-MODEL-QUANTIZED", UnsupportedModel):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("encode", "fields", "name"), [
    (gptq(), gptq_entry(format="bitblas"), "bitblas"), (gptq(), gptq_entry(format="marlin"), "marlin"),
    (gptq(), gptq_entry(online_hadamard=True), "online_hadamard"),
    (awq(), {"quant_method": "awq", "group_size": 32, "checkpoint_format": "gemv"}, "gemv"),
    (awq(), {"quant_method": "awq", "group_size": 32, "format": "llm-awq"}, "llm-awq"),
    (gptq(), {**gptq_entry(packing_format="auto_round:auto_gptq", rotation_config={"block": 32}),
              "quant_method": "auto-round"}, "rotation_config")])
def test_layouts_and_rotations_that_another_field_tells_of(tmp_path: Path, encode, fields: dict, name: str) -> None:
    write_quantized(tmp_path, fields, encode, num_hidden_layers=1)
    with refused("E-MODEL-QUANTIZED", UnsupportedModel) as refusal:
        open_checkpoint(tmp_path)
    assert name in refusal.error.what


def test_other_fields_are_noted_where_they_say_something(tmp_path: Path) -> None:
    write_quantized(tmp_path, gptq_entry(), gptq(), num_hidden_layers=1)
    for fields, noted in (({"kv_cache_scheme": {"num_bits": 8}}, "quantized cache (kv_cache_scheme)"),
                          ({"rotation": "hadamard"}, "rotation: hadamard"),
                          ({"smooth_rows": 3, "a": 1}, "not known here, and not used: a, smooth_rows"),
                          ({"smooth_rows": None, "other": False, "third": {}, "kv_cache_quant_algo": None}, "")):
        edit(tmp_path, quantization_config=gptq_entry(**fields))
        notes = open_checkpoint(tmp_path).notes
        assert (noted in notes[0]) if noted else notes == ()
