"""Is a stamped model the fully traced one? Are layers that differ told apart?"""

from __future__ import annotations

import gqa_models
import pytest
from evidence.output_hashes import output_hashes
from transformers import AutoConfig

from gqa_export.trace.tracing import trace

pytestmark = pytest.mark.whole_model


def both(folder, **options):
    config = AutoConfig.from_pretrained(folder)
    options = {"dtype": "float32", "cache": "growing", "capacity": 64, **options}
    return trace(config, **options), trace(config, stamping=False, **options)


@pytest.mark.parametrize(("name", "layers", "traced"), [("llama", 3, 2), ("smollm3", 5, 3)])
def test_a_stamped_model_is_the_fully_traced_one(tmp_path, name, layers, traced):
    stamped, whole = both(gqa_models.write_tiny(name, tmp_path / name, num_hidden_layers=layers), cache="static")
    assert stamped.traced_layers == traced < whole.traced_layers == layers
    assert output_hashes(stamped.model) == output_hashes(whole.model)
    assert [value.name for value in stamped.model.graph.input] == [value.name for value in whole.model.graph.input]
    assert [value.name for value in stamped.model.graph.output] == [value.name for value in whole.model.graph.output]


def test_two_kinds_of_layers_are_stamped_each_from_its_own(tmp_path):
    stamped, whole = both(gqa_models.write_tiny("gemma3", tmp_path / "gemma3"))
    assert (stamped.traced_layers, whole.traced_layers) == (4, 6)
    assert output_hashes(stamped.model) == output_hashes(whole.model)


def test_a_model_whose_layers_are_computed_from_their_number_is_traced_whole(tmp_path):
    from gqa_models.shrink import write_small

    config = AutoConfig.from_pretrained(write_small("minicpm3", tmp_path / "minicpm3"))  # scale / sqrt(layers)
    traced = trace(config, dtype="float32", cache="growing", capacity=64)
    assert traced.traced_layers == config.num_hidden_layers
    assert "computed from the number of layers" in traced.whole_because


def test_a_buffer_that_the_checkpoint_holds_is_a_weight_and_hinders_no_stamp(tmp_path):
    from gqa_models.shrink import write_small

    folder = write_small("dots1", tmp_path / "dots1", num_hidden_layers=4, n_routed_experts=2, num_experts_per_tok=1)
    config = AutoConfig.from_pretrained(folder)  # its routers have one
    traced = trace(config, dtype="float32", cache="growing", capacity=64)
    assert traced.traced_layers < config.num_hidden_layers
    recipes = {entry.value for tensor in traced.model.graph.initializer for entry in tensor.external_data}
    buffers = {f"weights:model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in range(1, 4)}
    assert buffers <= recipes


def test_the_structural_hash_sees_a_changed_attribute_and_a_changed_weight(tmp_path):
    folder = gqa_models.write_tiny("llama", tmp_path / "llama", num_hidden_layers=2)
    model = trace(AutoConfig.from_pretrained(folder), dtype="float32", cache="growing", capacity=64).model
    before = output_hashes(model)
    node = next(node for node in model.graph.node if node.op_type == "GroupedQueryAttention")
    scale = next(attribute for attribute in node.attribute if attribute.name == "scale")
    scale.f *= 2
    assert output_hashes(model)["logits"] != before["logits"]
    scale.f /= 2
    assert output_hashes(model) == before
    weight = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    weight.external_data[0].value += "x"
    assert output_hashes(model)["logits"] != before["logits"]


def test_a_trace_reads_no_weight(tmp_path):
    folder = gqa_models.write_tiny("llama", tmp_path / "llama")
    config = AutoConfig.from_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    model = trace(config, dtype="bfloat16", cache="static", capacity=64).model
    recipes = [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert len(recipes) == 3 * 9 + 3
    assert all(not tensor.raw_data for tensor in recipes)
