"""A tensor is missing that the description, or the other weights, say is there: without it a weight has other values,
and an export that has them too would be called exact. What the format's own library reads right is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_checkpoints import change, check, edit, first, halves, write_quantized
from refusal import refused

from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.errors import InvalidCheckpoint

from .test_compressed_tensors import entry as compressed
from .test_compressed_tensors import float8, four_bit_floats, packed
from .test_gptq_awq import entry as gptq_entry
from .test_gptq_awq import gptq
from .test_other_formats import BNB, bnb, int4_awq, modelopt_fp8, nvfp4, olive

ONE = {"num_hidden_layers": 1}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 16}


def zero_bytes(rng, rows, columns):
    """int8 with zero points of rows, as compressed-tensors (int-quantized) stores them."""
    codes, (scale, values), zero = rng.integers(-128, 128, (rows, columns)), halves(rng, rows, 1), rng.integers(
        1, 20, (rows, 1))
    return {".weight": torch.from_numpy(codes.astype(np.int8)), ".weight_scale": scale,
            ".weight_zero_point": torch.from_numpy(zero.astype(np.int8))}, (codes - zero) * values


def torchao(rng, rows, columns):
    parts, values = zero_bytes(rng, rows, columns)
    names = {".weight": "._weight_qdata", ".weight_scale": "._weight_scale", ".weight_zero_point":
             "._weight_zero_point"}
    return {names[name]: part for name, part in parts.items()}, values


def fp8_static(rng, rows, columns):
    parts, values = float8(lambda *_: ())(rng, rows, columns)
    return {".weight": parts[".weight"], ".weight_scale_inv": parts[".weight_scale"],
            ".activation_scale": torch.tensor(.5)}, values


INT8 = compressed("int-quantized", num_bits=8, strategy="channel", group_size=None, symmetric=False)


def with_inputs(form: str, dynamic: object, **weights: object) -> dict:
    found = compressed(form, **weights)
    found["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "float", "dynamic": dynamic}
    return found


def plain_inputs(encode):
    def do(rng, rows, columns):
        parts, values = encode(rng, rows, columns)
        return {name: part for name, part in parts.items() if not name.startswith(".input_")}, values
    return do


FP8 = {"num_bits": 8, "type": "float", "group_size": None, "strategy": "tensor"}
CASES = {
    "gptq desc_act": (gptq_entry(desc_act=True), gptq(order=True), "g_idx", "desc_act"),
    "gptq by the others": (gptq_entry(), gptq(order=True), "g_idx", "down_proj.g_idx is there"),
    "actorder": (compressed("pack-quantized", actorder="group"), packed(4, order=True), "weight_g_idx", "actorder"),
    "order by the others": (compressed("pack-quantized"), packed(4, order=True), "weight_g_idx", "is there"),
    "packed zeros": (compressed("pack-quantized", symmetric=False), packed(4, zeros=True), "weight_zero_point",
                     "symmetric: false"),
    "zeros by the others": (compressed("pack-quantized"), packed(4, zeros=True), "weight_zero_point", "is there"),
    "byte zeros": (INT8, zero_bytes, "weight_zero_point", "symmetric: false"),
    "olive": (*olive(4, False), "qzeros", "symmetric: false"),
    "modelopt smoothing": (MODELOPT, int4_awq(16, True), "pre_quant_scale", "gate_proj.pre_quant_scale is there"),
    "modelopt inputs": ({"quant_method": "modelopt", "quant_algo": "FP8"}, modelopt_fp8(lambda *_: ()), "input_scale",
                        "is there"),
    "nvfp4 inputs": ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, nvfp4, "input_scale",
                     "is there"),
    "torchao": ({"quant_method": "torchao"}, torchao, "_weight_zero_point", "is there"),
    "static fp8": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8_static, "activation_scale", "static"),
    "static inputs": (with_inputs("float-quantized", False, **FP8), float8(lambda *_: (1,), zero=True), "input_scale",
                      "dynamic: false"),
    "local inputs": (with_inputs("nvfp4-pack-quantized", "local", type="float", group_size=16), four_bit_floats(True),
                     "input_global_scale", "dynamic: local"),
    "global scale": (compressed("nvfp4-pack-quantized", type="float", group_size=16), four_bit_floats(True),
                     "weight_global_scale", ""),
    "nested scales": (BNB, bnb(nested=True), "weight.nested_absmax", "nested_blocksize"),
}


@pytest.mark.parametrize("which", CASES)
def test_a_tensor_that_one_weight_lacks_is_named_and_so_is_what_says_that_it_must_be_there(tmp_path: Path,
                                                                                        which: str) -> None:
    fields, encode, tail, why = CASES[which]
    check(tmp_path, write_quantized(tmp_path, fields, encode, **ONE), rtol=4e-16)
    lost = f"up_proj.{tail}"
    with refused("E-CKPT-QUANT-MISSING", InvalidCheckpoint) as refusal:
        open_checkpoint(change(tmp_path, lambda tensors: tensors.pop(first(tensors, lost))))
    assert lost in refusal.error.what
    assert why in refusal.error.what


@pytest.mark.parametrize(("fields", "encode"), [
    (gptq_entry(desc_act=True), gptq(index=False)),
    (compressed("pack-quantized", actorder="group"), packed(4)),
    (compressed("pack-quantized", symmetric=False), packed(4)),
    (with_inputs("float-quantized", False, **FP8), plain_inputs(float8(lambda *_: (1,), zero=True))),
    ({**MODELOPT, "has_zero_point": True}, int4_awq(16, True))])
def test_a_tensor_that_all_weights_lack_is_missed_because_of_the_description(tmp_path: Path, fields, encode) -> None:
    write_quantized(tmp_path, fields, encode, **ONE)
    with refused("E-CKPT-QUANT-MISSING", InvalidCheckpoint):
        open_checkpoint(tmp_path)


def without(tail: str):
    return lambda tensors: tensors.pop(first(tensors, tail))


def symmetric_down_proj(symmetric: bool) -> dict:
    found = compressed("pack-quantized", symmetric=False)
    found["config_groups"]["other"] = {"targets": ["re:.*down_proj"], "weights": {
        **found["config_groups"]["group_0"]["weights"], "symmetric": symmetric}}
    return found


def packed_by_shape(rng, rows, columns):
    return packed(4, zeros=columns != 96)(rng, rows, columns)


@pytest.mark.parametrize(("fields", "encode", "do"), [
    (gptq_entry(), gptq(), without("up_proj.g_idx")),  # groups lie as they would without it
    (gptq_entry(group=-1, desc_act=True), gptq(group=-1), without("up_proj.g_idx")),  # one group has no order
    (gptq_entry(desc_act=True, dynamic={".*up_proj": {"desc_act": False}}), gptq(), without("up_proj.g_idx")),
    (compressed("int-quantized", num_bits=8, strategy="channel", group_size=None), lambda *given: (
        {**zero_bytes(*given)[0], ".weight_zero_point": torch.zeros(given[1], 1, dtype=torch.int8)}, None),
     without("up_proj.weight_zero_point")),  # zeros are what is meant without them
    (symmetric_down_proj(True), packed_by_shape, lambda tensors: None),
    # ModelOpt folds smoothing of layers behind a norm into it
    (MODELOPT, int4_awq(16, True), lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(
        "pre_quant_scale") and not name.endswith(("o_proj.pre_quant_scale", "down_proj.pre_quant_scale"))]),
    ({"quant_method": "fp8", "activation_scheme": "dynamic"}, fp8_static, lambda tensors: [
        tensors.pop(name) for name in list(tensors) if name.endswith("activation_scale")])])
def test_what_the_library_of_the_format_reads_right_is_read(tmp_path: Path, fields, encode, do) -> None:
    write_quantized(tmp_path, fields, encode, **ONE)
    assert len(open_checkpoint(change(tmp_path, do)).quantized) == 7


def test_a_group_of_its_own_tells_a_weight_apart(tmp_path: Path) -> None:
    write_quantized(tmp_path, symmetric_down_proj(True), packed_by_shape, **ONE)
    edit(tmp_path, quantization_config=symmetric_down_proj(False))
    with refused("E-CKPT-QUANT-MISSING", InvalidCheckpoint) as refusal:
        open_checkpoint(tmp_path)
    assert "weights of other" in refusal.error.what
