"""LoRA adapters, switchable and merged, against PyTorch with the adapter beside the weights; and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gqa_models import write_tiny
from refusal import refused
from safetensors.torch import load_file, save_file

import gqa_export as gqa
from gqa_export.bundle.manifest import DATA
from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.lora import read_adapter
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.errors import InvalidCheckpoint, NotCheckedHere, UnsupportedModel
from gqa_export.runtime.ort.session import OrtSession
from gqa_export.runtime.torch_session import TorchSession

from .adapters import apply_by_hooks, write_adapter

CAPACITY = 48
ATTENTION = {"llama": ["q_proj", "v_proj", "o_proj"], "qwen2": ["q_proj", "k_proj", "v_proj", "down_proj"],
             "phi3": ["qkv_proj", "gate_up_proj"]}
"""modules of a first adapter: a part of what `ort` packs, all of it, and what the model itself packs"""
OTHERS = {"llama": ["gate_proj", "lm_head", "k_proj"], "qwen2": ["lm_head", "o_proj"], "phi3": ["o_proj", "qkv_proj"]}
IDS = np.random.default_rng(4).integers(0, 320, (2, 11))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """model type -> (checkpoint, {adapter's name: folder}, bundle of target `ort` with both, without)."""
    from gqa_models import write_tiny

    known: dict[str, tuple] = {}

    def make(name: str):
        if name not in known:
            place = tmp_path_factory.mktemp(name)
            checkpoint = write_tiny(name, place / "checkpoint", num_hidden_layers=2)
            model = load_model(open_checkpoint(checkpoint), "float32")
            adapters = {"poet": write_adapter(place / "poet", model, ATTENTION[name], seed=1),
                        "clerk": write_adapter(place / "clerk", model, OTHERS[name], seed=2, rank=3, alpha=9,
                                               use_rslora=True, ranks={OTHERS[name][0]: 5})}
            bundle = gqa.export(checkpoint, place / "switchable", capacity=CAPACITY, lora=list(adapters.values()))
            base = gqa.export(checkpoint, place / "base", capacity=CAPACITY)
            known[name] = checkpoint, adapters, bundle, base
        return known[name]

    return make


@pytest.mark.parametrize("name", list(ATTENTION))
def test_a_switchable_bundle_passes_the_suite_with_an_adapter(made, name) -> None:
    checkpoint, adapters, bundle, _ = made(name)
    assert bundle.validate(checkpoint, lora=adapters["poet"], steps=2).passed


@pytest.mark.parametrize("name", list(ATTENTION))
def test_each_adapter_gives_what_pytorch_gives_with_its_two_products_beside_the_weight(made, name) -> None:
    checkpoint, adapters, bundle, _ = made(name)
    session = bundle.session(provider="cpu")
    for adapter, scale in (("poet", 8 / 4), ("clerk", None)):
        model = load_model(open_checkpoint(checkpoint), "float32")
        if scale is None:
            by_rank(model, adapters[adapter])
        else:
            apply_by_hooks(model, adapters[adapter], scale)
        reference, eager = TorchSession(model, CAPACITY, "fp64"), TorchSession(model, CAPACITY, "fp32")
        session.use_adapter(adapter)
        answers = []
        for each in (session.inner, reference, eager):
            each.reset(2)
            answers.append(each.step(IDS).logits.astype(np.float64))
        got, expected, rounded = answers
        # the same sums in another order: a small multiple of what fp32 itself costs
        assert np.abs(got - expected).max() < 8 * np.abs(rounded - expected).max()


def by_rank(model: torch.nn.Module, folder: Path) -> None:
    """The second adapter: rsLoRA, whose modules have ranks of their own, each scaled by alpha / sqrt(rank)."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name, module in model.named_modules():
            key = f"base_model.model.{name}.lora_"
            if f"{key}A.weight" in tensors:
                first, second = (tensors[f"{key}{part}.weight"] for part in "AB")
                assert first.shape[0] in (3, 5)
                scale = 9 / first.shape[0] ** 0.5

                def add(_, given, answer, first=first, second=second, scale=scale):
                    x = given[0]
                    return answer + scale * (x @ first.to(x.dtype).T) @ second.to(x.dtype).T

                module.register_forward_hook(add)


@pytest.mark.parametrize("name", list(ATTENTION))
def test_without_an_adapter_a_switchable_bundle_is_the_base_model_bit_for_bit(made, name) -> None:
    _, _, bundle, base = made(name)
    ours, plain = bundle.session(provider="cpu"), base.session(provider="cpu")
    for _ in range(2):
        for ids in (IDS, IDS[:, :1]):
            assert np.array_equal(ours.step(ids), plain.step(ids))
        ours.use_adapter("poet")
        assert not np.array_equal(ours.step(IDS), plain.step(IDS))
        ours.use_adapter(None)
        plain.reset(2)


@pytest.mark.parametrize("cache", ["growing", "static"])
def test_adapters_are_switched_within_one_session_and_each_starts_with_an_empty_cache(made, cache) -> None:
    checkpoint, adapters, _, _ = made("llama")
    folder = adapters["poet"].parent / f"again-{cache}"
    bundle = gqa.export(checkpoint, folder, cache=cache, capacity=CAPACITY, lora=list(adapters.values()))
    session, shown = bundle.session(provider="cpu"), {}
    assert session.inner.adapters == ["clerk", "poet"]
    for name in ("poet", None, "clerk", "poet", None, "clerk"):
        session.use_adapter(name)
        assert session.inner.adapter == (name or "")
        assert not session.lengths.any()
        session.reset(2)
        got = [session.step(IDS), session.step(IDS[:, :1]), session.step(IDS[:, :1])]
        for one, other in zip(got, shown.setdefault(name, got)):
            assert np.array_equal(one, other)
    assert np.abs(shown["poet"][0] - shown["clerk"][0]).max() > 0.1
    with refused("E-RUN-ADAPTER") as refusal:
        session.use_adapter("nothing")
    assert "clerk, poet" in refusal.error.fix


@pytest.mark.parametrize(("name", "target"), [("llama", "ort"), ("phi3", "portable")])
def test_a_merged_adapter_passes_the_suite_against_the_checkpoint_with_it(made, tmp_path, name, target) -> None:
    checkpoint, adapters, _, _ = made(name)
    bundle = gqa.export(checkpoint, tmp_path / "merged", target=target, capacity=CAPACITY, merge_lora=adapters["poet"])
    assert bundle.manifest.source["merged_lora"] == str(adapters["poet"])
    assert bundle.validate(checkpoint, lora=adapters["poet"], steps=2).passed
    assert not bundle.validate(checkpoint, steps=2).passed
    with refused("E-RUN-ADAPTER"):
        bundle.session(provider="cpu").use_adapter("poet")


def test_standard_operators_take_adapters_too(made, tmp_path) -> None:
    checkpoint, adapters, _, _ = made("llama")
    bundle = gqa.export(checkpoint, tmp_path / "onnx", target="onnx", capacity=CAPACITY, lora=[adapters["poet"]])
    assert bundle.validate(checkpoint, lora=adapters["poet"], steps=2).passed
    with refused("E-RUN-ADAPTER"):
        bundle.validate(checkpoint, lora=adapters["clerk"], steps=2)


def test_onnxruntimes_own_lora_adapter_reads_the_file(made) -> None:
    import onnxruntime

    _, _, bundle, _ = made("llama")
    session = OrtSession.load(bundle.folder, "cpu")
    session.use_adapter("poet")
    session.reset(2)
    expected = session.step(IDS).logits
    plain = onnxruntime.InferenceSession(str(bundle.folder / "model.onnx"), providers=["CPUExecutionProvider"])
    assert not [port.name for port in plain.get_inputs() if "lora" in port.name]
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(bundle.folder / "poet.onnx_adapter"))
    options.add_active_adapter(adapter)
    feed = {"input_ids": IDS, "attention_mask": np.ones((2, 11), np.int64)}
    feed.update({port.name: np.zeros((2, port.shape[1], 0, port.shape[3]), np.float32)
                 for port in plain.get_inputs() if "past" in port.name})
    got = plain.run(["logits"], feed, options)[0]
    # the same kernels on the same numbers
    assert np.array_equal(got, expected)


def test_onnxruntime_genai_generates_the_same_tokens_with_an_adapter(made) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    _, _, bundle, _ = made("llama")
    session, model = bundle.session(provider="cpu"), og.Model(str(bundle.folder))
    adapters = og.Adapters(model)
    for name in ("poet", "clerk"):
        adapters.load(str(bundle.folder / f"{name}.onnx_adapter"), name)
    for name in (None, "poet", "clerk"):
        session.use_adapter(name)
        ours = bundle.complete(token_ids=IDS[0].tolist(), max_new_tokens=12, session=session).tokens
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=11 + 12, batch_size=1)
        generator = og.Generator(model, params)
        if name is not None:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(IDS[:1].astype(np.int32))
        theirs = []
        while not generator.is_done() and len(theirs) < len(ours):
            generator.generate_next_token()
            theirs.append(int(generator.get_next_tokens()[0]))
        assert theirs == ours[: len(theirs)]
        assert len(theirs) >= len(ours) - 1  # genai does not count an end token


@pytest.fixture
def llama(made):
    checkpoint, *_ = made("llama")
    return checkpoint, load_model(open_checkpoint(checkpoint), "float32")


@pytest.mark.parametrize(("config", "words"), [
    ({"use_dora": True}, "DoRA"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"bias": "lora_only"}, "bias"),
    ({"lora_bias": True}, "lora_bias"), ({"fan_in_fan_out": True}, "fan_in_fan_out"), ({"peft_type": "IA3"}, "IA3"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "experts"),
    ({"trainable_token_indices": [3]}, "embedding"), ({"layer_replication": [[0, 2]]}, "repeats layers"),
])
def test_an_adapter_that_is_more_than_a_plain_lora_is_refused_by_name(llama, tmp_path, config, words) -> None:
    folder = write_adapter(tmp_path / "adapter", llama[1], ["q_proj"], **config)
    for option in ({"lora": [folder]}, {"merge_lora": folder}):
        with refused("E-MODEL-LORA", UnsupportedModel) as refusal:
            gqa.export(llama[0], tmp_path / "out", **option)
        assert words in refusal.error.what
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["model.embed_tokens.lora_embedding_A", "model.layers.0.self_attn.q_proj.lora_B.bias",
                                 "model.layers.0.self_attn.q_proj.lora_magnitude_vector", "lm_head.weight"])
def test_a_tensor_that_is_not_a_factor_is_refused_by_name(llama, tmp_path, key) -> None:
    folder = write_adapter(tmp_path / "adapter", llama[1], ["q_proj"],
                           tensors={f"base_model.model.{key}": torch.zeros(4, 4)})
    with refused("E-MODEL-LORA", UnsupportedModel) as refusal:
        read_adapter(folder)
    assert key in refusal.error.what


@pytest.mark.parametrize(("name", "shape"), [("model.layers.9.self_attn.q_proj", (64, 64)), ("model.foo", (64, 64)),
                                             ("model.layers.0.self_attn.q_proj", (64, 32)),
                                             ("model.layers.0.self_attn.q_proj", (32, 64))])
def test_a_module_that_the_model_does_not_have_or_has_in_another_shape_is_refused(llama, tmp_path, name, shape) -> None:
    key, (out, width) = f"base_model.model.{name}.lora_", shape
    folder = write_adapter(tmp_path / "adapter", llama[1], [], tensors={
        f"{key}A.weight": torch.ones(4, width), f"{key}B.weight": torch.ones(out, 4)})
    for option in ({"lora": [folder]}, {"merge_lora": folder}):
        with refused("E-MODEL-LORA-MODULES", UnsupportedModel) as refusal:
            gqa.export(llama[0], tmp_path / "out", **option)
        assert name in refusal.error.what


@pytest.mark.parametrize("damage", [{"r": 5}, {"lora_alpha": None}, {"lora_alpha": float("inf")}, {"r": None}])
def test_a_configuration_that_does_not_fit_its_tensors_is_refused(llama, tmp_path, damage) -> None:
    folder = write_adapter(tmp_path / "adapter", llama[1], ["q_proj"], **damage)
    with refused("E-CKPT-LORA-TENSORS", InvalidCheckpoint):
        read_adapter(folder)


def test_a_factor_without_its_other_half_an_empty_adapter_and_a_missing_file_are_refused(llama, tmp_path) -> None:
    half = write_adapter(tmp_path / "half", llama[1], [], tensors={
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)})
    empty = write_adapter(tmp_path / "empty", llama[1], [])
    for folder in (half, empty):
        with refused("E-CKPT-LORA-TENSORS", InvalidCheckpoint):
            read_adapter(folder)
    (empty / "adapter_model.safetensors").unlink()
    with refused("E-CKPT-LORA-FILES", InvalidCheckpoint):
        read_adapter(empty)


def test_options_that_do_not_go_together_are_refused(made, llama, tmp_path) -> None:
    checkpoint, adapters, _, _ = made("llama")
    poet = adapters["poet"]
    for option, code in (({"lora": [poet], "merge_lora": poet}, "E-OPTION-LORA"),
                         ({"lora": [poet, poet]}, "E-OPTION-LORA-NAME"),
                         ({"lora": [poet], "target": "trt-plugin"}, "E-TARGET-LORA")):
        with refused(code):
            gqa.export(checkpoint, tmp_path / "out", **option)
    with refused("E-OPTION-LORA"):
        gqa.export(llama[1], tmp_path / "out", merge_lora=poet)


def test_a_tied_head_takes_a_switchable_adapter_and_no_merged_one(tmp_path) -> None:
    """Merged, the head's part would change the embedding, which is the same tensor."""
    from gqa_models import write_tiny

    checkpoint = write_tiny("qwen2", tmp_path / "checkpoint", num_hidden_layers=2, tie_word_embeddings=True)
    model = load_model(open_checkpoint(checkpoint), "float32")
    head = write_adapter(tmp_path / "head", model, ["lm_head"])
    bundle = gqa.export(checkpoint, tmp_path / "switchable", capacity=CAPACITY, lora=[head])
    apply_by_hooks(model, head, 2.0)
    session, reference = bundle.session(provider="cpu"), TorchSession(model, CAPACITY, "fp32")
    session.use_adapter("head")
    reference.reset(2)
    assert np.abs(session.step(IDS) - reference.step(IDS).logits).max() < 1e-4  # fp32 on logits of about 10
    with refused("E-MODEL-LORA-TIED", UnsupportedModel):
        gqa.export(checkpoint, tmp_path / "merged", merge_lora=head)


def test_low_precision_adapters_are_stored_in_the_bundles_number_format(made, tmp_path) -> None:
    import onnxruntime

    checkpoint, *_ = made("llama")
    model = load_model(open_checkpoint(checkpoint), "float32")
    low = write_adapter(tmp_path / "low", model, ["q_proj"], dtype=torch.bfloat16)
    for dtype, kind in (("fp16", "tensor(float16)"), ("bf16", "tensor(bfloat16)")):
        bundle = gqa.export(checkpoint, tmp_path / dtype, dtype=dtype, capacity=CAPACITY, lora=[low])
        values = onnxruntime.AdapterFormat.read_adapter(str(bundle.folder / "low.onnx_adapter")).get_parameters()
        assert {value.data_type() for value in values.values()} == {kind}
        with refused("E-VALIDATE-ADAPTER", NotCheckedHere):
            bundle.validate(checkpoint, as_dtype="fp32", lora=low)
    assert bundle.manifest.source["adapters"] == ["low"]
    assert bundle.validate(checkpoint, as_dtype="fp32", steps=2).passed


def test_an_adapter_that_peft_itself_wrote_gives_what_peft_gives(made, tmp_path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: the arithmetic of these tests is our own")
    checkpoint, *_ = made("phi3")
    model = load_model(open_checkpoint(checkpoint), "float32")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["qkv_proj", "down_proj"], init_lora_weights=False,
                             use_rslora=True, rank_pattern={"down_proj": 2}, alpha_pattern={"layers.1.*qkv_proj": 3})
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "theirs")
    bundle = gqa.export(checkpoint, tmp_path / "out", capacity=CAPACITY, lora=[tmp_path / "theirs"])
    session = bundle.session(provider="cpu")
    session.use_adapter("theirs")
    with torch.no_grad():
        expected = wrapped(torch.from_numpy(IDS)).logits.numpy()
        base = wrapped.unload()(torch.from_numpy(IDS)).logits.numpy()
    assert np.abs(session.step(IDS) - expected).max() < 1e-4  # fp32 on logits of about 10
    assert np.abs(base - expected).max() > 0.1


def test_the_command_line_exports_compares_and_runs_adapters(made, tmp_path) -> None:
    import json

    from click.testing import CliRunner

    from gqa_export.cli import main

    checkpoint, adapters, _, _ = made("phi3")
    poet = str(adapters["poet"])
    done = CliRunner().invoke(main, ["onnx", str(checkpoint), "-o", str(tmp_path / "out"), "--lora", poet, "--capacity",
                                     str(CAPACITY)])
    assert done.exit_code == 0, done.output
    assert "adapter poet:" in done.output
    assert done.output.lower().count("passed") == 2
    tokens = []
    for more in ([], ["--adapter", "poet"]):
        done = CliRunner().invoke(main, ["run", str(tmp_path / "out"), "--token-ids", "1,2,3", "--json", *more,
                                         "--max-new-tokens", "6"])
        assert done.exit_code == 0, done.output
        tokens.append(json.loads(done.stdout)["tokens"])
    assert tokens[0] != tokens[1]


def test_an_adapter_is_merged_into_weights_that_transformers_splits_on_load(tmp_path, monkeypatch) -> None:
    import transformers.conversion_mapping as mapping
    import transformers.core_model_loading as loading
    import transformers.modeling_utils as modeling

    plain = write_tiny("llama", tmp_path / "plain", num_hidden_layers=2)
    adapter = write_adapter(tmp_path / "poet", load_model(open_checkpoint(plain), "float32"), ["q_proj"], seed=3)
    expected = gqa.export(plain, tmp_path / "a", capacity=CAPACITY, merge_lora=adapter)
    joined, names = shutil.copytree(plain, tmp_path / "joined"), ["q_proj.weight", "k_proj.weight", "v_proj.weight"]
    tensors = load_file(joined / "model.safetensors")
    for layer in range(2):
        parts = [tensors.pop(f"model.layers.{layer}.self_attn.{name}") for name in names]
        tensors[f"model.layers.{layer}.self_attn.qkv.weight"] = torch.cat(parts)
    save_file(tensors, joined / "model.safetensors", metadata={"format": "pt"})

    def rules(*_, **__):
        return [loading.WeightConverter(["qkv.weight"], names, [loading.Split(dim=0)])]

    monkeypatch.setattr(mapping, "get_model_conversion_mapping", rules)
    monkeypatch.setattr(modeling, "get_model_conversion_mapping", rules)
    found = gqa.export(joined, tmp_path / "b", capacity=CAPACITY, merge_lora=adapter, trace_cache=False)
    assert (found.folder / DATA).read_bytes() == (expected.folder / DATA).read_bytes()
