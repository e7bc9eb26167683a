"""Weights made one at a time are those that transformers loads: every kind of conversion, every architecture's kind of
rule, and what cannot be followed."""

from __future__ import annotations

import gqa_models
import numpy as np
import pytest
import torch
from gqa_models.shrink import write_small
from refusal import refused
from safetensors.torch import load_file, save_file

from gqa_export.checkpoint.load_config import load_config
from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.errors import InvalidCheckpoint
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.trace import skeleton
from gqa_export.weights.loaded import loaded
from gqa_export.weights.source_kinds import MemorySource, StoredSource

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def followed(folder):
    """The sources of a checkpoint's weights, and the model as transformers loads it."""
    checkpoint = open_checkpoint(folder)
    name = checkpoint.stored_dtype
    model = skeleton.build(load_config(checkpoint), getattr(torch, name), device="meta")
    return loaded(checkpoint.tensors, model), checkpoint


def same(source, tensor):
    """Whether a source has the bytes of a tensor."""
    data = b"".join(bytes(chunk) for chunk in source.chunks())
    return data == tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def hold(folder):
    """Every weight that transformers loads is found, and is the same to the last bit."""
    found, checkpoint = followed(folder)
    state = load_model(checkpoint).state_dict()
    tied = {name for group in skeleton.tied(load_model(checkpoint)) for name in group}
    assert set(state) - set(found.sources) <= tied
    for name, tensor in state.items():
        if name in found.sources:
            assert found.sources[name].shape == tuple(tensor.shape), name
            assert same(found.sources[name], tensor), name
    return found


@pytest.mark.parametrize(("name", "made", "apart"), [
    ("mixtral", {GATE_UP, DOWN}, True),
    ("qwen3_next", {GATE_UP, DOWN}, True),
    ("nemotron_h", {"mixer.experts.down_proj", "mixer.experts.up_proj"}, True),
    ("olmo_hybrid", {"linear_attn.conv1d.weight"}, False),
    ("lara_mini", None, False),
    ("granitemoehybrid", set(), False),
    ("gpt_neox", set(), False),
])
def test_what_transformers_loads_is_made_one_weight_at_a_time(name, made, apart, tmp_path):
    found = hold(write_small(name, tmp_path / "ck"))
    sources = {key: source for key, source in found.sources.items() if isinstance(source, MemorySource)}
    if made is not None:
        assert {key.split(".", 3)[-1] for key in sources} == made
    assert all((source.make.func.__name__ == "_apart") is apart for source in sources.values())


def llama(folder, change):
    """A small llama whose stored tensors were changed: `change` gets and gives name -> tensor."""
    gqa_models.write_tiny("llama", folder, num_hidden_layers=2)
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(folder / "model.safetensors")).items()},
              folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def moved(tensors, ends, into, make):
    """Tensors with these ends of names replaced by one (or those) of other ends, layer by layer."""
    result = {name: tensor for name, tensor in tensors.items() if not name.endswith(tuple(ends))}
    for layer in range(2):
        full = [next(name for name in tensors if f"layers.{layer}." in name and name.endswith(end)) for end in ends]
        for end, tensor in zip(into, make(*(tensors[name] for name in full))):
            result[full[0].replace(ends[0], end)] = tensor
    return result


KINDS = {
    "Chunk": (["gate_proj.weight", "up_proj.weight"], ["gate_up.weight"], lambda a, b: [torch.cat([a, b])], {"dim": 0}),
    "Split": (["q_proj.weight", "k_proj.weight", "v_proj.weight"], ["qkv.weight"],
              lambda a, b, c: [torch.cat([a, b, c])], {"dim": 0}),
    "Concatenate": (["down_proj.weight"], ["down_a.weight", "down_b.weight"], lambda a: a.chunk(2, 1), {"dim": 1}),
    "Transpose": (["o_proj.weight"], ["o_kernel.weight"], lambda a: [a.T], {}),
    "Interleave": (["up_proj.weight"], ["up_pairs.weight"],
                   lambda a: [a.reshape(2, -1, a.shape[1]).transpose(0, 1).reshape(a.shape)], {"dim": 0}),
    "PermuteForRope": (["q_proj.weight"], ["q_pairs.weight"], lambda a: [a], {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_conversion_is_transformers_own(kind, tmp_path, monkeypatch):
    import transformers.conversion_mapping as mapping
    import transformers.core_model_loading as loading
    import transformers.modeling_utils as modeling

    ends, into, make, words = KINDS[kind]
    stored = load_file(llama(tmp_path / "plain", dict) / "model.safetensors")
    folder = llama(tmp_path / "ck", lambda tensors: moved(tensors, ends, into, make))

    def rules(*_, **__):
        return [loading.WeightConverter(list(into), list(ends), [getattr(loading, kind)(**words)])]

    monkeypatch.setattr(mapping, "get_model_conversion_mapping", rules)
    monkeypatch.setattr(modeling, "get_model_conversion_mapping", rules)
    found = hold(folder)
    made = [name for name, source in found.sources.items() if isinstance(source, MemorySource)]
    assert len(made) == 2 * len(ends)
    if kind != "PermuteForRope":
        assert all(same(found.sources[name], stored[name]) for name in made)


def test_a_model_with_rules_that_nothing_stored_needs_is_linked_whole(tmp_path):
    folder = write_small("qwen3_next", tmp_path / "ck", num_experts=0, mlp_only_layers=[])
    found = hold(folder)
    assert all(isinstance(source, StoredSource) for source in found.sources.values())
    done = export_onnx(folder, tmp_path / "out", ExportOptions(weights="link", capacity=64))
    assert done.manifest.bytes_copied == 0


def test_a_missing_expert_is_refused_as_loading_refuses_it(tmp_path):
    folder = write_small("mixtral", tmp_path / "ck")
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "experts.2" in name and "layers.1" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, folder / "model.safetensors",
              metadata={"format": "pt"})
    with refused("E-CKPT-TENSORS-MISSING", InvalidCheckpoint):
        export_onnx(folder, tmp_path / "out", ExportOptions(capacity=64))


def test_experts_are_made_one_by_one_in_no_more_memory_than_one_takes(tmp_path):
    found, _ = followed(write_small("mixtral", tmp_path / "ck"))
    source = next(source for name, source in found.sources.items() if name.endswith(GATE_UP))
    parts = list(source.make())
    assert [tuple(part.shape) for part in parts] == [(1, *source.shape[1:])] * source.shape[0]
    assert found.largest == 3 * 4 * int(np.prod(source.shape[1:]))


def test_types_are_those_that_transformers_casts_to(tmp_path):
    folder = write_small("mixtral", tmp_path / "ck")
    tensors = load_file(folder / "model.safetensors")
    halves = {name: tensor if "experts.1" in name else tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    found, checkpoint = followed(folder)
    state = load_model(checkpoint).state_dict()
    for name, source in found.sources.items():
        if isinstance(source, MemorySource):
            assert source.dtype == str(state[name].dtype).removeprefix("torch.")
            assert same(source, state[name])


def test_a_name_that_is_renamed_and_merged_at_once_is_left_to_loading(tmp_path):
    folder = write_small("mixtral", tmp_path / "ck")
    found, checkpoint = followed(folder)
    name = next(name for name in found.sources if name.endswith(GATE_UP))
    twice = {**checkpoint.tensors, name: next(iter(checkpoint.tensors.values()))}
    assert loaded(twice, skeleton.build(load_config(checkpoint), torch.float32, device="meta")) is None
