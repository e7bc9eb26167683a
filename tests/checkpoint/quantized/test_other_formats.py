"""FP8 blocks, ModelOpt, bitsandbytes, torchao, HQQ and Olive: exact values, and refusals of what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_checkpoints import change, check, codes_of, first, halves, spread, write_quantized
from refusal import refused

from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.checkpoint.quantized.description import METHODS
from gqa_export.checkpoint.quantized.read import READERS
from gqa_export.errors import InvalidCheckpoint, UnsupportedModel

E2M1 = np.array([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6])


def low_first(codes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8))


def rectangles(scale: np.ndarray, high: int, wide: int, rows: int, columns: int) -> np.ndarray:
    return np.repeat(np.repeat(scale, high, axis=0), wide, axis=1)[:rows, :columns]


def e4m3(rng: np.random.Generator, *shape: int) -> tuple[torch.Tensor, np.ndarray]:
    made = torch.from_numpy(rng.normal(0, 40, shape)).to(torch.float8_e4m3fn)
    return made, made.double().numpy()


def test_every_method_has_a_reader() -> None:
    assert set(READERS) == set(METHODS)


def fp8_blocks(high: int, wide: int, powers: str = ""):
    def encode(rng, rows, columns):
        weight, numbers = e4m3(rng, rows, columns)
        shape = -(-rows // high), -(-columns // wide)
        scale, values = halves(rng, *shape, dtype=torch.float32)
        if powers:
            exponents = rng.integers(110, 126, shape).astype(np.uint8)
            values, scale = 2.0 ** (exponents - 127.0), torch.from_numpy(exponents)
            scale = scale.view(torch.float8_e8m0fnu) if powers == "e8m0" else scale
        return {".weight": weight, ".weight_scale_inv": scale}, \
            numbers * rectangles(values, high, wide, rows, columns)

    return encode


def fp8(high: int, wide: int) -> dict:
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [high, wide]}


@pytest.mark.parametrize(("high", "wide", "powers"), [(32, 32, ""), (40, 24, ""), (128, 128, ""), (40, 24, "e8m0"),
                                                      (32, 32, "uint8")])
def test_fp8_in_blocks_that_need_not_fill_the_matrix(tmp_path: Path, high: int, wide: int, powers: str) -> None:
    values = write_quantized(tmp_path, fp8(high, wide), fp8_blocks(high, wide, powers))
    for matrix in check(tmp_path, values).values():
        assert (matrix.kind, matrix.block, matrix.row_block) == ("e4m3", min(wide, matrix.columns),
                                                               min(high, matrix.rows))


def test_fp8_with_one_scale(tmp_path: Path) -> None:
    def encode(rng, rows, columns):
        weight, numbers = e4m3(rng, rows, columns)
        return {".weight": weight, ".weight_scale_inv": torch.tensor(.125), ".activation_scale": torch.tensor(.5)}, \
            numbers * .125

    fields = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    found = check(tmp_path, write_quantized(tmp_path, fields, encode))
    assert {(matrix.row_block == matrix.rows, matrix.input_scale) for matrix in found.values()} == {(True, .5)}


def drop(end: str):
    return lambda tensors: tensors.pop(first(tensors, end))


def turn(end: str):
    def do(tensors):
        name = first(tensors, end)
        tensors[name] = tensors[name].T
    return do


def set_to(end: str, value: torch.Tensor):
    return lambda tensors: tensors.update({first(tensors, end): value})


def add(name: str, value: torch.Tensor):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(("do", "code"), [
    (drop("_scale_inv"), "E-CKPT-QUANT-ORPHAN"), (turn("_scale_inv"), "E-CKPT-QUANT-SHAPE"),
    (drop("up_proj.weight"), "E-CKPT-QUANT-MISSING"),
    (set_to("up_proj.weight", torch.ones(96, 64)), "E-CKPT-QUANT-ORPHAN"),
    (set_to("up_proj.weight", torch.ones(96, 64).to(torch.float8_e5m2)), "E-CKPT-QUANT-DTYPE"),
    (add("lm_head.weight_scale_inv", torch.ones(3, 3)), "E-CKPT-QUANT-ORPHAN"),
    (set_to("up_proj.weight_scale_inv", torch.full((3, 3), 255, dtype=torch.uint8)), "E-CKPT-QUANT-VALUE")])
def test_fp8_that_does_not_fit(tmp_path: Path, do, code: str) -> None:
    write_quantized(tmp_path, fp8(40, 24), fp8_blocks(40, 24))
    with refused(code, InvalidCheckpoint):
        open_checkpoint(change(tmp_path, do))


def test_fp8_of_another_block_size_is_refused(tmp_path: Path) -> None:
    write_quantized(tmp_path, fp8(128, 128), fp8_blocks(40, 24))
    with refused("E-CKPT-QUANT-SHAPE", InvalidCheckpoint):
        open_checkpoint(tmp_path)


def test_fbgemm(tmp_path: Path) -> None:
    def encode(rng, rows, columns):
        weight, numbers = e4m3(rng, rows, columns)
        scale, values = halves(rng, rows, 1, dtype=torch.float32)
        return {".weight": weight, ".weight_scale": scale, ".input_scale_ub": torch.tensor([1200.0])}, numbers * values

    check(tmp_path, write_quantized(tmp_path, {"quant_method": "fbgemm_fp8"}, encode))


def nvfp4(rng, rows, columns):
    codes = rng.integers(0, 16, (rows, columns))
    scale, values = e4m3(rng, rows, columns // 16)
    second = torch.tensor(rng.uniform(1e-4, 1e-3), dtype=torch.float32)
    return {".weight": low_first(codes), ".weight_scale": scale, ".weight_scale_2": second,
            ".input_scale": torch.tensor(.125)}, E2M1[codes] * spread(values, 16, columns) * second.double().numpy()


def int4_awq(group: int, smooth: bool):
    def encode(rng, rows, columns):
        codes = codes_of(rng, rows, columns, 4) - 8
        scale, values = halves(rng, rows, columns // group)
        unsigned = (codes & 15).astype(np.uint8)
        parts = {".weight": torch.from_numpy(unsigned[::2] | unsigned[1::2] << 4), ".weight_scale": scale}
        weight = codes * spread(values, group, columns)
        if smooth:
            parts[".pre_quant_scale"] = torch.from_numpy(rng.uniform(.5, 2, columns)).to(torch.bfloat16)
            weight = weight * parts[".pre_quant_scale"].double().numpy()
        return parts, weight

    return encode


def modelopt_fp8(shape):
    def encode(rng, rows, columns):
        weight, numbers = e4m3(rng, rows, columns)
        scale, values = halves(rng, *shape(rows, columns), dtype=torch.float32)
        parts = {".weight": weight, ".weight_scale": scale, ".input_scale": torch.tensor(.25)}
        if scale.ndim >= 2:
            values = rectangles(values.reshape(-(-rows // 32), -(-columns // 32)), 32, 32, rows, columns)
        return parts, numbers * (values[:, None] if scale.ndim == 1 else values)

    return encode


def mxfp8(rng, rows, columns):
    weight, numbers = e4m3(rng, rows, columns)
    powers = rng.integers(110, 126, (rows, columns // 32)).astype(np.uint8)
    return {".weight": weight, ".weight_scale": torch.from_numpy(powers)}, numbers * spread(2.0 ** (powers - 127.0), 32,
                                                                                           columns)


@pytest.mark.parametrize("group", [32, None])
def test_modelopt_mxfp8(tmp_path: Path, group: int | None) -> None:
    fields = {"quant_method": "modelopt", "quant_algo": "MXFP8", **({"group_size": group} if group else {})}
    for matrix in check(tmp_path, write_quantized(tmp_path, fields, mxfp8)).values():
        assert (matrix.kind, matrix.block, matrix.row_block, matrix.scale_dtype) == ("e4m3", 32, 1, "bfloat16")


@pytest.mark.parametrize("method", ["modelopt_fp4", "modelopt"])
def test_modelopt_by_its_other_name(tmp_path: Path, method: str) -> None:
    values = write_quantized(tmp_path, {"quant_method": method}, nvfp4)
    assert set(open_checkpoint(tmp_path).quantized) == set(values)


@pytest.mark.parametrize(("method", "encode", "fields"), [
    ("fp8", fp8_blocks(32, 32), {"weight_block_size": ["a", 32]}), ("fp8", fp8_blocks(32, 32),
                                                                     {"weight_block_size": [0, 32]}),
    ("olive", fp8_blocks(32, 32), {"bits": []})])
def test_a_description_that_makes_no_sense_is_refused(tmp_path: Path, method: str, encode, fields: dict) -> None:
    write_quantized(tmp_path, {"quant_method": method, **fields}, encode)
    with pytest.raises((InvalidCheckpoint, UnsupportedModel)):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("fields", "encode", "kind"), [
    ({"quant_algo": "NVFP4", "group_size": 16}, nvfp4, "e2m1"),
    ({"quant_algo": "W4A16_AWQ", "group_size": 32}, int4_awq(32, False), "int"),
    ({"quant_algo": "W4A16_AWQ", "group_size": 32}, int4_awq(32, True), "int"),
    ({"quant_algo": "FP8"}, modelopt_fp8(lambda rows, columns: ()), "e4m3"),
    ({"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, modelopt_fp8(lambda rows, columns: (rows,)), "e4m3"),
    ({"quant_algo": "FP8_PB_WO", "group_size": 32},
     modelopt_fp8(lambda rows, columns: (-(-rows // 32), 1, columns // 32, 1)), "e4m3")])
@pytest.mark.parametrize("beside", ["", "hf_quant_config.json"])
def test_modelopt(tmp_path: Path, fields: dict, encode, kind: str, beside: str) -> None:
    entry = {"producer": {"name": "modelopt"}, "quantization": fields} if beside else {"quant_method": "modelopt",
                                                                                        **fields}
    values = write_quantized(tmp_path, entry, encode, beside=beside)
    for matrix in check(tmp_path, values, rtol=4e-16).values():
        assert matrix.kind == kind


@pytest.mark.parametrize(("algorithm", "scale"), [("NVFP4", .125), ("W4A8_NVFP4_FP8", None)])
def test_a_scale_of_inputs_of_another_type_is_not_the_weights(tmp_path: Path, algorithm: str,
                                                              scale: float | None) -> None:
    """Inputs of FP8 beside weights of FP4: the scale is six times as large as one of NVFP4."""
    values = write_quantized(tmp_path, {"quant_method": "modelopt", "quant_algo": algorithm, "group_size": 16}, nvfp4)
    assert {matrix.input_scale for matrix in check(tmp_path, values, rtol=4e-16).values()} == {scale}


def test_of_a_mixed_checkpoint_each_layer_has_an_algorithm_of_its_own(tmp_path: Path) -> None:
    """The entry of a module counts before that of the module around it. Nothing is told of those without either."""
    layers = {"model.layers.0.mlp": "W4A8_NVFP4_FP8", "model.layers.0.mlp.up_proj": "NVFP4",
              "model.layers.1.self_attn.q_proj": "W4A8_NVFP4_FP8", "model.layers.1.mlp.up": "W4A8_NVFP4_FP8"}
    entry = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "group_size": 16,
             "quantized_layers": {name: {"quant_algo": algorithm} for name, algorithm in layers.items()}}
    write_quantized(tmp_path, entry, nvfp4)
    without = {name for name, matrix in open_checkpoint(tmp_path).quantized.items() if matrix.input_scale is None}
    assert without == set(open_checkpoint(tmp_path).quantized) - {"model.layers.0.mlp.up_proj.weight"}


@pytest.mark.parametrize("beside", ["", "hf_quant_config.json"])
def test_layers_of_mixed_algorithms_have_inputs_and_groups_of_their_own(tmp_path: Path, beside: str) -> None:
    """Weights of FP4 with inputs of FP8, of FP4 and of a type that nothing tells; integers in groups of 32 and FP8.
    Of the whole, a group size would be that of other layers."""
    kinds = {"q_proj": ("W4A8_NVFP4_FP8", nvfp4), "k_proj": ("NVFP4", nvfp4), "v_proj": ("", nvfp4),
             "o_proj": ("W4A16_AWQ", int4_awq(32, False)), "gate_proj": ("FP8", modelopt_fp8(lambda *_: ())),
             "up_proj": ("NVFP4_AWQ", nvfp4), "down_proj": ("W4A16_NVFP4", nvfp4)}
    write_quantized(tmp_path / "names", {"quant_method": "modelopt"}, nvfp4, num_hidden_layers=1)
    names = sorted(open_checkpoint(tmp_path / "names").quantized)
    order = [kinds[name.split(".")[-2]] for name in names]
    layers = {name.removesuffix(".weight"): {"quant_algo": algorithm, **({"group_size": 32 if "AWQ" in algorithm and
              "16" in algorithm else 16} if algorithm[0] in "NW" else {})}
              for name, (algorithm, _) in zip(names, order, strict=True) if algorithm}
    fields = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers,
              "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}}}
    turns = iter(order)
    values = write_quantized(
        tmp_path / "ck", {"quantization": fields} if beside else {"quant_method": "modelopt", **fields},
        lambda rng, rows, columns: next(turns)[1](rng, rows, columns), num_hidden_layers=1, beside=beside)
    found = check(tmp_path / "ck", values, rtol=4e-16)
    assert {name.split(".")[-2]: matrix.input_scale for name, matrix in found.items()} == {
        "q_proj": None, "k_proj": .125, "v_proj": None, "o_proj": None, "gate_proj": .25, "up_proj": .125,
        "down_proj": None}


@pytest.mark.parametrize(("encode", "do", "code"), [
    (nvfp4, drop("weight_scale_2"), "E-CKPT-QUANT-MISSING"), (nvfp4, drop("weight_scale"), "E-CKPT-QUANT-ORPHAN"),
    (nvfp4, turn("up_proj.weight_scale"), "E-CKPT-QUANT-SHAPE"),
    (nvfp4, set_to("weight_scale_2", torch.tensor(0.0)), "E-CKPT-QUANT-VALUE"),
    (int4_awq(16, True), set_to("pre_quant_scale", torch.ones(7)), "E-CKPT-QUANT-SHAPE"),
    (int4_awq(16, True), turn("up_proj.weight_scale"), "E-CKPT-QUANT-SHAPE"),
    (modelopt_fp8(lambda *_: ()), drop("weight_scale"), "E-CKPT-QUANT-ORPHAN"),
    (modelopt_fp8(lambda *_: ()), add("lm_head.weight_scale", torch.tensor(1.0)), "E-CKPT-QUANT-ORPHAN"),
    (modelopt_fp8(lambda *_: ()), add("lm_head.pre_quant_scale", torch.ones(64)), "E-CKPT-QUANT-ORPHAN")])
def test_modelopt_that_does_not_fit(tmp_path: Path, encode, do, code: str) -> None:
    write_quantized(tmp_path, {"quant_method": "modelopt", "group_size": 16}, encode)
    with refused(code, InvalidCheckpoint):
        open_checkpoint(change(tmp_path, do))


def test_modelopt_w4a8_is_refused_by_name(tmp_path: Path) -> None:
    write_quantized(tmp_path, {"quant_method": "modelopt", "group_size": 32}, int4_awq(32, False))
    change(tmp_path, lambda tensors: tensors.update({name.replace("scale", "scale_2"): torch.tensor(1.0) for name in
                                                     list(tensors) if name.endswith("weight_scale")}))
    with refused("E-MODEL-QUANTIZED", UnsupportedModel) as refusal:
        open_checkpoint(tmp_path)
    assert "W4A8" in refusal.error.what


NF4 = torch.tensor([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                    0.7229568362236023, 1.0])
FP4 = torch.tensor([0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, -0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0]) / 12


def bnb(kind: str = "nf4", block: int = 64, nested: bool = False):
    table = {"nf4": NF4, "fp4": FP4}[kind]

    def encode(rng, rows, columns):
        codes = rng.integers(0, 16, (rows, columns))
        flat, blocks = codes.reshape(-1), -(-rows * columns // block)
        absmax = torch.from_numpy(rng.uniform(.01, .1, blocks).astype(np.float32))
        state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [rows, columns]}
        parts = {".weight": torch.from_numpy((flat[::2] << 4 | flat[1::2]).astype(np.uint8))[:, None],
                 ".weight.quant_map": table}
        if nested:
            outer = torch.from_numpy(rng.uniform(.01, .05, -(-blocks // 16)).astype(np.float32))
            inner = torch.from_numpy(np.sort(rng.uniform(-1, 1, 256)).astype(np.float32))
            which = torch.from_numpy(rng.integers(0, 256, blocks).astype(np.uint8))
            state |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": .0625}
            absmax = inner[which.long()] * outer.repeat_interleave(16)[:blocks] + .0625
            parts |= {".weight.absmax": which, ".weight.nested_absmax": outer, ".weight.nested_quant_map": inner}
        else:
            parts[".weight.absmax"] = absmax
        raw = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
        parts[f".weight.quant_state.bitsandbytes__{kind}"] = torch.from_numpy(raw)
        scales = np.repeat(absmax.double().numpy(), block)[: rows * columns].reshape(rows, columns)
        return parts, table.double().numpy()[codes] * scales

    return encode


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(("kind", "block", "nested", "width"), [
    ("nf4", 64, False, 32), ("fp4", 64, False, 32), ("nf4", 64, True, 32), ("nf4", 32, False, 32),
    ("nf4", 128, True, 32)])
def test_bitsandbytes_in_blocks_that_go_on_in_the_next_row(tmp_path: Path, kind: str, block: int, nested: bool,
                                                           width: int) -> None:
    found = check(tmp_path, write_quantized(tmp_path, BNB, bnb(kind, block, nested)))
    assert {matrix.kind for matrix in found.values()} == {kind}
    assert min(matrix.block for matrix in found.values()) == width


def test_bitsandbytes_int8(tmp_path: Path) -> None:
    def encode(rng, rows, columns):
        codes = rng.integers(-127, 128, (rows, columns))
        peaks = torch.from_numpy(rng.uniform(.1, .5, rows).astype(np.float32))
        return {".weight": torch.from_numpy(codes.astype(np.int8)), ".SCB": peaks,
                ".weight_format": torch.tensor(0, dtype=torch.uint8)}, codes * peaks.double().numpy()[:, None] / 127

    values = write_quantized(tmp_path, {"quant_method": "bitsandbytes", "load_in_8bit": True}, encode)
    check(tmp_path, values, rtol=4e-16)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_bitsandbytes_codes_that_are_stored_as_floats_for_sharding(tmp_path: Path, storage: torch.dtype) -> None:
    def encode(rng, rows, columns):
        parts, weight = bnb()(rng, rows, columns)
        return {**parts, ".weight": parts[".weight"].reshape(-1).view(storage)[:, None]}, weight

    check(tmp_path, write_quantized(tmp_path, BNB, encode, num_hidden_layers=1))


def int8_in(layout: int):
    def encode(rng, rows, columns):
        return {".weight": torch.zeros(rows, columns, dtype=torch.int8), ".SCB": torch.ones(rows),
                ".weight_format": torch.tensor(layout, dtype=torch.uint8)}, np.zeros((rows, columns))
    return encode


@pytest.mark.parametrize(("layout", "code"), [(1, "E-MODEL-QUANTIZED"), (2, "E-MODEL-QUANTIZED"),
                                              (3, "E-MODEL-QUANTIZED"), (4, "E-CKPT-QUANT-VALUE")])
def test_bitsandbytes_int8_in_tiles_of_a_device_is_refused(tmp_path: Path, layout: int, code: str) -> None:
    write_quantized(tmp_path, {"quant_method": "bitsandbytes", "load_in_8bit": True}, int8_in(layout),
                    num_hidden_layers=1)
    with refused(code) as refusal:
        open_checkpoint(tmp_path)
    assert {1: "col32", 2: "col_turing", 3: "col_ampere", 4: "[4]"}[layout] in refusal.error.what


STATE = ".quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(("do", "code"), [
    (drop(".absmax"), "E-CKPT-QUANT-MISSING"), (drop(".quant_map"), "E-CKPT-QUANT-MISSING"),
    (drop(STATE), "E-CKPT-QUANT-ORPHAN"), (set_to(".quant_map", NF4.flip(0)), "E-CKPT-QUANT-VALUE"),
    (set_to(".quant_map", FP4), "E-CKPT-QUANT-VALUE"), (set_to(".absmax", torch.ones(3)), "E-CKPT-QUANT-SHAPE"),
    (set_to(STATE, torch.zeros(4, dtype=torch.uint8)), "E-CKPT-QUANT-VALUE"),
    (add("lm_head.weight.absmax", torch.ones(3)), "E-CKPT-QUANT-ORPHAN")])
def test_bitsandbytes_that_does_not_fit(tmp_path: Path, do, code: str) -> None:
    write_quantized(tmp_path, BNB, bnb())
    with refused(code, InvalidCheckpoint):
        open_checkpoint(change(tmp_path, do))


@pytest.mark.parametrize("zeros", ["none", "zero", "other"])
def test_torchao(tmp_path: Path, zeros: str) -> None:
    def encode(rng, rows, columns):
        codes = rng.integers(-128, 128, (rows, columns))
        scale, values = halves(rng, rows, 1, dtype=torch.bfloat16)
        zero = rng.integers(1, 9, (rows, 1)) if zeros == "other" else np.zeros((rows, 1), np.int64)
        parts = {"._weight_qdata": torch.from_numpy(codes.astype(np.int8)), "._weight_scale": scale}
        if zeros != "none":
            parts["._weight_zero_point"] = torch.from_numpy(zero.astype(np.int8))
        return parts, (codes - zero) * values

    values = write_quantized(tmp_path, {"quant_method": "torchao"}, encode)
    assert {matrix.offset for matrix in check(tmp_path, values).values()} == {"zero" if zeros == "other" else "none"}
    with refused("E-CKPT-QUANT-MISSING", InvalidCheckpoint):
        open_checkpoint(change(tmp_path, drop("_weight_scale")))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_hqq(tmp_path: Path, bits: int) -> None:
    def encode(rng, rows, columns):
        codes, group, each = codes_of(rng, rows, columns, bits), 32, 8 // bits
        lines = codes.reshape(-1, group)
        scale, values = halves(rng, len(lines), 1)
        zero = torch.from_numpy(rng.uniform(0, (1 << bits) - 1, (len(lines), 1))).to(torch.float16)
        part = len(lines) // each
        packed = sum(lines[part * place : part * (place + 1)] << 8 - bits * (place + 1) for place in range(each))
        return {".W_q": torch.from_numpy(packed.astype(np.uint8)), ".scale": scale, ".zero": zero,
                ".shape": torch.tensor([rows, columns]), ".nbits": torch.tensor(bits), ".axis": torch.tensor(1),
                ".group_size": torch.tensor(group), ".view_as_float": torch.tensor(0, dtype=torch.uint8),
                ".packing": torch.tensor(list(f"{bits}bit_u8".encode()), dtype=torch.uint8)}, \
            ((lines - zero.double().numpy()) * values).reshape(rows, columns)

    fields = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": bits, "group_size": 32,
                                                                              "axis": 1}}}
    values = write_quantized(tmp_path / "model", fields, encode, num_hidden_layers=1)
    for name, matrix in open_checkpoint(tmp_path / "model").quantized.items():
        stripe = matrix.stripe()
        np.testing.assert_allclose(matrix.dequantize(), values[name], rtol=0, atol=1e-15)
        assert (stripe.scale * stripe.minimum).shape == (matrix.rows, matrix.columns // 32)
    name = "model.layers.0.mlp.up_proj"
    for setting, value in {"axis": 0, "nbits": 3, "group_size": 64, "view_as_float": 1, "packing": "3bit_32",
                           "quant_zero": 1, "shape": [32, 192]}.items():
        wrong = torch.tensor(list(value.encode()) if isinstance(value, str) else value)
        shutil.copytree(tmp_path / "model", tmp_path / setting)
        with refused("E-CKPT-QUANT-VALUE" if setting != "shape" else "E-CKPT-TENSORS-SHAPE") as refusal:
            load_model(open_checkpoint(change(tmp_path / setting, add(f"{name}.{setting}", wrong))))
        assert f"up_proj.{setting if setting != 'shape' else 'weight'}" in refusal.error.what
    fields["quant_config"]["weight_quant_params"]["axis"] = 0
    other = tmp_path / "other"
    write_quantized(other, fields, encode)
    with refused("E-MODEL-QUANTIZED", UnsupportedModel):
        open_checkpoint(other)


def olive(bits: int, symmetric: bool, dtype: torch.dtype = torch.float32):
    """Codes, zero points and scales by rows of groups of 32, low bits first."""
    def packed(codes):
        each = 8 // bits
        whole = np.zeros((len(codes), -(-codes.shape[1] // each) * each), np.int64)
        whole[:, : codes.shape[1]] = codes
        return torch.from_numpy((whole.reshape(len(codes), -1, each) << np.arange(each) * bits).sum(2).astype(np.uint8))

    def encode(rng, rows, columns):
        codes = codes_of(rng, rows, columns, bits)
        scale, values = halves(rng, rows, columns // 32, dtype=dtype)
        zero = np.full(scale.shape, 1 << bits - 1) if symmetric else rng.integers(0, 1 << bits, scale.shape)
        return {".qweight": packed(codes), ".scales": scale, ".qzeros": packed(zero)}, \
            (codes - spread(zero, 32, columns)) * spread(values, 32, columns)

    return {"quant_method": "olive", "bits": bits, "group_size": 32, "symmetric": symmetric}, encode


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False), (2, False)])
def test_olive(tmp_path: Path, bits: int, symmetric: bool) -> None:
    found = check(tmp_path, write_quantized(tmp_path, *olive(bits, symmetric)))
    assert all(bool(matrix.in_place) == symmetric for matrix in found.values())
    with refused("E-CKPT-QUANT-SHAPE", InvalidCheckpoint):
        open_checkpoint(change(tmp_path, turn("up_proj.scales")))


def test_formats_that_are_not_read_are_refused_by_name(tmp_path: Path) -> None:
    methods = ("exl3", "aqlm", "vptq", "spqr", "qqq", "higgs", "quark", "bitnet", "eetq", "quanto")
    for place, method in enumerate(methods):
        write_quantized(tmp_path / str(place), {"quant_method": method}, lambda rng, rows, columns: (
            {".weight": torch.zeros(rows, columns, dtype=torch.int8), ".scale_of": torch.ones(rows)}, np.zeros(1)))
        with refused("E-MODEL-QUANTIZED", UnsupportedModel) as refusal:
            open_checkpoint(tmp_path / str(place))
        assert f"({method}" in refusal.error.what
