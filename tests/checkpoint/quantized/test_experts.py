"""Experts: GPT-OSS' four-bit floats, and matrices of single experts that transformers stacks as it loads them."""

from __future__ import annotations

import re
from pathlib import Path

import gqa_models
import numpy as np
import pytest
import torch
from gqa_models.shrink import write_small
from quantized_checkpoints import change, edit, save
from refusal import refused
from safetensors.torch import load_file

from gqa_export.checkpoint.load_model import load_model, load_skeleton
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.checkpoint.quantized.parameters import by_parameter, parameters_of
from gqa_export.checkpoint.unused_tensors import unused_notes
from gqa_export.errors import InvalidCheckpoint
from gqa_export.exporting import prepare as preparing
from gqa_export.exporting import weight_store
from gqa_export.exporting.options import ExportOptions
from gqa_export.progress import silent
from gqa_export.weights.memory_budget import Budget
from gqa_export.weights.source_kinds import DequantizedSource

from . import test_compressed_tensors as compressed
from .test_gptq_awq import entry, gptq
from .test_other_formats import E2M1, fp8, fp8_blocks, low_first, nvfp4


def write_gpt_oss(folder: Path) -> dict[str, np.ndarray]:
    """A GPT-OSS of one layer; gives the values of its experts as the model has them."""
    gqa_models.write_tiny("gpt_oss", folder, num_hidden_layers=1)
    tensors, values, rng = load_file(folder / "model.safetensors"), {}, np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        experts, columns, rows = tensors.pop(name).shape
        codes = rng.integers(0, 16, (experts, rows, columns))
        powers = rng.integers(118, 124, (experts, rows, columns // 32))
        tensors[f"{name}_blocks"] = low_first(codes).reshape(experts, rows, columns // 32, 16)
        tensors[f"{name}_scales"] = torch.from_numpy(powers.astype(np.uint8))
        values[name] = (E2M1[codes] * np.repeat(2.0 ** (powers - 127.0), 32, axis=2)).swapaxes(1, 2)
    save(folder, tensors)
    edit(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    return values


def test_gpt_oss_has_its_experts_turned(tmp_path: Path) -> None:
    values = write_gpt_oss(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    state = load_model(checkpoint, "fp64").state_dict()
    assert unused_notes(checkpoint, ()) == ()
    assert set(checkpoint.quantized) == set(values)
    for name, expected in values.items():
        matrix = checkpoint.quantized[name]
        assert (matrix.kind, matrix.block, matrix.transposed) == ("e2m1", 32, True)
        np.testing.assert_array_equal(matrix.parameter(), expected)
        np.testing.assert_array_equal(state[name].numpy(), expected)


@pytest.mark.parametrize(("do", "code"), [
    (lambda tensors, name: tensors.pop(f"{name}_scales"), "E-CKPT-QUANT-MISSING"),
    (lambda tensors, name: tensors.pop(f"{name}_blocks"), "E-CKPT-QUANT-ORPHAN"),
    (lambda tensors, name: tensors[f"{name}_scales"].view(-1)[:1].fill_(255), "E-CKPT-QUANT-VALUE"),
    (lambda tensors, name: tensors.update({f"{name}_scales": tensors[f"{name}_scales"].swapaxes(1, 2)}),
     "E-CKPT-QUANT-SHAPE"),
    (lambda tensors, name: tensors.update({f"{name}_blocks": tensors[f"{name}_blocks"].flatten(2)}),
     "E-CKPT-QUANT-SHAPE")])
def test_gpt_oss_that_does_not_fit(tmp_path: Path, do, code: str) -> None:
    write_gpt_oss(tmp_path)
    change(tmp_path, lambda tensors: do(tensors, "model.layers.0.mlp.experts.down_proj"))
    with refused(code, InvalidCheckpoint):
        open_checkpoint(tmp_path)


def write_mixtral(folder: Path, fields: dict, encode, plain: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """A Mixtral of one layer with every expert's matrices apart; gives the values that transformers stacks."""
    gqa_models.write_tiny("mixtral", folder, num_hidden_layers=1)
    tensors, apart, rng = load_file(folder / "model.safetensors"), {}, np.random.default_rng(3)
    for name in [name for name in tensors if ".experts." in name and not name.endswith(plain)]:
        parts, apart[name] = encode(rng, *tensors.pop(name).shape)
        tensors.update({name.removesuffix(".weight") + suffix: part for suffix, part in parts.items()})
    save(folder, tensors)
    edit(folder, quantization_config=fields)
    stem = "model.layers.0.block_sparse_moe.experts"
    experts = range(sum(name.endswith("w2.weight") for name in apart))
    if plain:
        return apart
    together = {"gate_up_proj": [np.concatenate([apart[f"{stem}.{expert}.w{part}.weight"] for part in (1, 3)])
                                 for expert in experts],
                "down_proj": [apart[f"{stem}.{expert}.w2.weight"] for expert in experts]}
    return {f"model.layers.0.mlp.experts.{name}": np.stack(each) for name, each in together.items()}


def test_single_experts_are_stacked_as_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = write_mixtral(tmp_path, entry(sym=False), gptq(symmetric=False))
    checkpoint = open_checkpoint(tmp_path)
    matrices, plain, _ = by_parameter(checkpoint, load_skeleton(checkpoint))
    state = load_model(checkpoint, "fp64").state_dict()
    assert set(matrices) == set(values)
    assert set(matrices) | set(plain) == set(state)
    for name, expected in values.items():
        np.testing.assert_array_equal(matrices[name].parameter(), expected)
        np.testing.assert_array_equal(state[name].numpy(), expected)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(weight_store, "load_model", refuse)
    ready = preparing.prepare(checkpoint, ExportOptions(target="ort", capacity=16, trace_cache=False), silent, Budget())
    found = [source for source in ready.store.sources.values() if isinstance(source, DequantizedSource)]
    assert sorted(source.shape for source in found) == sorted(value.shape for value in values.values())


@pytest.mark.parametrize(("name", "fields", "encode", "parts", "layer"), [
    ("deepseek_v3", fp8(32, 32), fp8_blocks(32, 32), ("gate_proj", "up_proj", "down_proj"), 1),
    ("kimi_linear", compressed.entry("pack-quantized", symmetric=False), compressed.packed(4, zeros=True),
     ("w1", "w3", "w2"), 2),
    ("nemotron_h", entry(), gptq(), ("up_proj", "down_proj"), 2)])
def test_experts_are_stacked_whatever_they_are_called(tmp_path: Path, name: str, fields: dict, encode,
                                                      parts: tuple[str, ...], layer: int) -> None:
    """FP8 in blocks beside a layer that predicts a further token, which DeepSeek-V3's model does not have; experts that
    are renamed as they are stacked; experts without a gate."""
    write_small(name, tmp_path)
    tensors, values, rng = load_file(tmp_path / "model.safetensors"), {}, np.random.default_rng(3)
    for weight in [weight for weight in tensors if re.search(rf"layers\.{layer}\..*experts\.\d", weight)]:
        found, values[weight] = encode(rng, *tensors.pop(weight).shape)
        tensors.update({weight.removesuffix(".weight") + suffix: part for suffix, part in found.items()})
    if name == "deepseek_v3":
        tensors.update({each.replace("layers.1.", "layers.61."): tensor for each, tensor in tensors.items()
                        if ".layers.1." in each})
    save(tmp_path, tensors)
    edit(tmp_path, quantization_config=fields)
    checkpoint = open_checkpoint(tmp_path)
    matrices, _, left = by_parameter(checkpoint, load_skeleton(checkpoint))
    (down,) = [each for each in matrices if each.endswith(".down_proj") and f".{layer}." in each]
    stem = next(iter(values)).partition(".experts.")[0]
    one = [[values[f"{stem}.experts.{expert}.{part}.weight"] for part in parts] for expert in range(4)]
    assert not left
    np.testing.assert_array_equal(matrices[down].parameter(), np.stack([each[-1] for each in one]))
    np.testing.assert_array_equal(matrices[down.replace("down_proj", "gate_up_proj" if len(parts) == 3 else "up_proj")]
                                  .parameter(), np.stack([np.concatenate(each[:-1]) for each in one]))
    assert len(unused_notes(checkpoint, ())) == (name == "deepseek_v3")


def test_second_scales_of_experts_go_into_their_scales(tmp_path: Path) -> None:
    """Each matrix of NVFP4 has a second scale of its own."""
    values = write_mixtral(tmp_path, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4)
    checkpoint = open_checkpoint(tmp_path)
    matrices, plain, left = by_parameter(checkpoint, load_skeleton(checkpoint))
    state = load_model(checkpoint, "fp64").state_dict()
    assert set(matrices) == set(values)
    assert not left
    assert not any("experts" in name for name in plain)
    for name, expected in values.items():
        np.testing.assert_allclose(matrices[name].parameter(), expected, rtol=2**-23)  # scales are rounded once
        np.testing.assert_allclose(state[name].numpy(), expected, rtol=4e-16)


def in_order(symmetric: bool = True):
    """GPTQ whose columns are sorted, matrices of one input (as those of an expert have it) alike."""
    seeds = {64: iter([number // 2 for number in range(99)]), 128: iter(range(99))}

    def encode(rng, rows, columns):
        return gptq(symmetric=symmetric, order=True)(np.random.default_rng(next(seeds[columns])), rows, columns)

    return encode


def test_experts_may_each_have_columns_in_an_order_of_their_own(tmp_path: Path) -> None:
    values = write_mixtral(tmp_path, entry(), in_order())
    checkpoint = open_checkpoint(tmp_path)
    matrices, _, left = by_parameter(checkpoint, load_skeleton(checkpoint))
    assert not left
    for name, expected in values.items():
        assert matrices[name].column_order.shape == (4, expected.shape[-1])
        np.testing.assert_array_equal(matrices[name].parameter(), expected)
        np.testing.assert_array_equal(matrices[name].dequantize(3, 70), expected.reshape(-1, expected.shape[-1])[3:70])


def test_what_cannot_be_stacked_is_named(tmp_path: Path) -> None:
    """The two matrices of an expert that transformers joins have their columns in different orders."""
    write_mixtral(tmp_path, entry(), gptq(order=True))
    checkpoint = open_checkpoint(tmp_path)
    matrices, _, left = by_parameter(checkpoint, load_skeleton(checkpoint))
    assert set(matrices) == {"model.layers.0.mlp.experts.down_proj"}
    assert left == {"model.layers.0.mlp.experts.gate_up_proj": "GPTQ 4 bits, group 32"}


def test_experts_of_which_some_are_plain_are_left_to_their_values(tmp_path: Path) -> None:
    write_mixtral(tmp_path, entry(), gptq(), plain=("0.w1.weight", "w2.weight"))
    checkpoint = open_checkpoint(tmp_path)
    assert by_parameter(checkpoint, load_skeleton(checkpoint))[0] == {}


def test_names_that_are_the_parameters_need_no_structure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = write_gpt_oss(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    monkeypatch.setattr("gqa_export.checkpoint.load_model.load_skeleton", None)
    assert parameters_of(checkpoint, values) == (checkpoint.quantized, checkpoint.tensors, {})
