"""compressed-tensors: every layout that is read has the values its layout means, and what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_checkpoints import change, check, codes_of, edit, first, halves, spread, words, write_quantized
from refusal import refused

from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.errors import InvalidCheckpoint

GROUP = 32


def entry(form: str, **weights: object) -> dict:
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, **weights}
    return {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": None}},
            "ignore": ["lm_head"]}


def packed(bits: int, group: int = GROUP, *, zeros: bool = False, order: bool = False, dtype: object = torch.bfloat16):
    def encode(rng, rows, columns):
        codes, per_row = codes_of(rng, rows, columns, bits), -(-columns // group) if group > 0 else 1
        scale, values = halves(rng, rows, per_row, dtype=dtype)
        zero = rng.integers(0, 1 << bits, (rows, per_row)) if zeros else np.full((rows, per_row), 1 << bits - 1)
        of = rng.permutation(np.arange(columns) // group) if order else np.arange(columns) // (group if group > 0
                                                                                               else columns)
        weight = (codes - zero[:, of]) * values[:, of]
        parts = {".weight_packed": words(codes, bits), ".weight_scale": scale,
                 ".weight_shape": torch.tensor([rows, columns])}
        if zeros:
            parts[".weight_zero_point"] = words(zero.T, bits).T
        if order:
            parts[".weight_g_idx"] = torch.from_numpy(of.astype(np.int32))
        return parts, weight

    return encode


@pytest.mark.parametrize(("bits", "group", "more"), [
    (4, 32, {}), (8, 32, {}), (8, -1, {}), (4, -1, {}), (4, 32, {"zeros": True}), (8, 16, {"zeros": True}),
    (4, 32, {"order": True}), (4, 32, {"zeros": True, "order": True}), (4, 32, {"dtype": torch.float32}),
    (4, 40, {"zeros": True})])
def test_packed_integers(tmp_path: Path, bits: int, group: int, more: dict) -> None:
    scheme = {"num_bits": bits, "group_size": group if group > 0 else None, "symmetric": "zeros" not in more}
    values = write_quantized(tmp_path, entry("pack-quantized", **scheme), packed(bits, group, **more))
    for name, matrix in check(tmp_path, values).items():
        assert (matrix.bits, matrix.block) == (bits, group if group > 0 else matrix.columns)
        assert matrix.offset == ("zero" if "zeros" in more else "none")
        assert (matrix.column_order is not None) == ("order" in more)
        assert matrix.in_place == ("" if more.keys() & {"zeros", "order"} else f"{name}_packed")


def test_the_packed_bytes_are_the_codes_of_a_row_low_bits_first(tmp_path: Path) -> None:
    write_quantized(tmp_path, entry("pack-quantized"), packed(4))
    checkpoint = open_checkpoint(tmp_path)
    matrix = checkpoint.quantized["model.layers.0.mlp.up_proj.weight"]
    tensor = checkpoint.packed[matrix.in_place]
    raw = np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.offset).reshape(matrix.rows, -1)
    codes = np.stack([raw & 15, raw >> 4], axis=2).reshape(matrix.shape).astype(int) - 8
    np.testing.assert_array_equal(codes, matrix.stripe().codes)


def float8(shape_of, *, blocks: tuple[int, int] | None = None, zero: bool = False):
    def encode(rng, rows, columns):
        weight = torch.from_numpy(rng.normal(0, 30, (rows, columns))).to(torch.float8_e4m3fn)
        scale, values = halves(rng, *shape_of(rows, columns), dtype=torch.float32)
        values = values.reshape(values.shape or (1, 1))
        if blocks:
            values = np.repeat(np.repeat(values, blocks[0], axis=0), blocks[1], axis=1)[:rows, :columns]
        parts = {".weight": weight, ".weight_scale": scale}
        if zero:
            parts[".weight_zero_point"] = torch.zeros(scale.shape, dtype=torch.float8_e4m3fn)
            parts[".input_scale"] = torch.tensor([.25])
        return parts, weight.double().numpy() * values

    return encode


@pytest.mark.parametrize(("shape_of", "blocks", "row_block"), [
    (lambda rows, columns: (rows, 1), None, 1), (lambda rows, columns: (1,), None, 0),
    (lambda rows, columns: (), None, 0), (lambda rows, columns: (-(-rows // 40), -(-columns // 48)), (40, 48), 40)])
def test_float8_with_a_scale_for_all_for_a_row_and_for_blocks_that_do_not_fill_the_matrix(
        tmp_path: Path, shape_of, blocks, row_block) -> None:
    scheme = {"num_bits": 8, "type": "float", "group_size": None,
              **({"strategy": "block", "block_structure": list(blocks)} if blocks else {"strategy": "channel"})}
    values = write_quantized(tmp_path, entry("float-quantized", **scheme), float8(shape_of, blocks=blocks))
    for matrix in check(tmp_path, values).values():
        assert (matrix.kind, matrix.row_block) == ("e4m3", min(row_block or matrix.rows, matrix.rows))


def of_group(target: str, **weights: object) -> dict:
    return {"targets": [target], "weights": {"num_bits": 8, "type": "float", "symmetric": True, **weights}}


def test_every_group_of_layers_has_the_blocks_of_its_own_targets(tmp_path: Path) -> None:
    def encode(rng, rows, columns):  # down_proj alone has 96 columns
        shape = (lambda rows, columns: (-(-rows // 32), -(-columns // 48))) if columns == 96 else (
            lambda rows, columns: (rows, 1))
        return float8(shape, blocks=(32, 48) if columns == 96 else None)(rng, rows, columns)

    fields = entry("float-quantized")
    fields["config_groups"] = {"blocks": of_group("re:.*down_proj$", strategy="block", block_structure="32x48"),
                               "rows": of_group("Linear", strategy="channel")}
    values = write_quantized(tmp_path, fields, encode, num_hidden_layers=1)
    sizes = {name.split(".")[-2]: (matrix.row_block, matrix.block) for name, matrix in check(tmp_path, values).items()}
    assert (sizes["down_proj"], sizes["up_proj"]) == ((32, 48), (1, 64))
    fields["config_groups"]["blocks"]["targets"] = ["re:.*up_proj$"]
    edit(tmp_path, quantization_config=fields)
    with refused("E-CKPT-QUANT-SHAPE", InvalidCheckpoint):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("target", ["re:.*down_proj", "model.layers.0.mlp.down_proj", "SomeLinear"])
def test_blocks_of_two_sizes_that_give_as_many_scales_are_told_apart_by_targets_or_refused(tmp_path: Path,
                                                                                           target: str) -> None:
    fields, group = entry("pack-quantized"), {"num_bits": 4, "type": "int"}
    fields["config_groups"] = {"a": of_group("Linear", group_size=64, **group),
                               "b": of_group(target, group_size=48, **group)}

    def encode(rng, rows, columns):
        return packed(4, 48 if columns == 96 else 64)(rng, rows, columns)

    values = write_quantized(tmp_path, fields, encode, num_hidden_layers=1)
    if target != "SomeLinear":
        assert {matrix.block for matrix in check(tmp_path, values).values()} == {48, 64}
        return
    with refused("E-CKPT-QUANT-SHAPE", InvalidCheckpoint) as refusal:
        open_checkpoint(tmp_path)
    assert "1 x 64 and of 1 x 48" in refusal.error.what


@pytest.mark.parametrize("weights", [{"block_structure": "32by48"}, {"block_structure": [32]}, {"group_size": "many"}])
def test_sizes_that_are_not_numbers_are_named(tmp_path: Path, weights: dict) -> None:
    write_quantized(tmp_path, entry("pack-quantized", **weights), packed(4), num_hidden_layers=1)
    with refused("E-CKPT-QUANT-DESCRIPTION", InvalidCheckpoint) as refusal:
        open_checkpoint(tmp_path)
    assert next(iter(weights)) in refusal.error.what


def test_static_scales_of_inputs_are_kept_and_zero_points_of_zero_are_none(tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "type": "float", "group_size": None, "strategy": "tensor"}
    values = write_quantized(tmp_path, entry("float-quantized", **scheme), float8(lambda *_: (1,), zero=True))
    assert {matrix.input_scale for matrix in check(tmp_path, values).values()} == {.25}


@pytest.mark.parametrize(("zeros", "per_row"), [(False, True), (True, True), (True, False)])
def test_plain_bytes(tmp_path: Path, zeros: bool, per_row: bool) -> None:
    def encode(rng, rows, columns):
        codes = rng.integers(-128, 128, (rows, columns))
        scale, values = halves(rng, *((rows, 1) if per_row else (1,)))
        zero = rng.integers(-20, 20, scale.shape) | 1
        parts = {".weight": torch.from_numpy(codes.astype(np.int8)), ".weight_scale": scale}
        if zeros:
            parts[".weight_zero_point"] = torch.from_numpy(zero.astype(np.int8))
        return parts, (codes - (zero if zeros else 0)) * values

    scheme = {"num_bits": 8, "type": "int", "group_size": None, "strategy": "channel"}
    check(tmp_path, write_quantized(tmp_path, entry("int-quantized", **scheme), encode))


def four_bit_floats(nv: bool):
    def encode(rng, rows, columns):
        codes, group = rng.integers(0, 16, (rows, columns)), 16 if nv else 32
        numbers = np.array([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6])[codes]
        parts = {".weight_packed": torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8))}
        if not nv:
            powers = rng.integers(110, 125, (rows, columns // group))
            return {**parts, ".weight_scale": torch.from_numpy(powers.astype(np.uint8))}, \
                numbers * spread(2.0 ** (powers - 127.0), group, columns)
        scale = torch.from_numpy(rng.uniform(1, 400, (rows, columns // group))).to(torch.float8_e4m3fn)
        whole = torch.tensor([rng.uniform(300, 3000)], dtype=torch.float32)
        parts |= {".weight_scale": scale, ".weight_global_scale": whole, ".input_global_scale": torch.tensor([4.0])}
        return parts, numbers * spread(scale.double().numpy(), group, columns) / whole.double().numpy()

    return encode


@pytest.mark.parametrize("nv", [True, False])
def test_four_bit_floats(tmp_path: Path, nv: bool) -> None:
    scheme = {"type": "float", "group_size": 16 if nv else 32}
    form = "nvfp4-pack-quantized" if nv else "mxfp4-pack-quantized"
    values = write_quantized(tmp_path, entry(form, **scheme), four_bit_floats(nv))
    for matrix in check(tmp_path, values).values():
        assert (matrix.kind, matrix.block, matrix.input_scale) == ("e2m1", 16 if nv else 32, .25 if nv else None)


def transpose(end: str):
    def do(tensors):
        name = first(tensors, end)
        tensors[name] = tensors[name].T
    return do


def drop(end: str):
    return lambda tensors: tensors.pop(first(tensors, end))


def add(name: str, tensor: torch.Tensor):
    return lambda tensors: tensors.update({name: tensor})


PLACE = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(("do", "code"), [
    (drop("weight_scale"), "E-CKPT-QUANT-MISSING"), (drop("weight_shape"), "E-CKPT-QUANT-MISSING"),
    (drop("weight_packed"), "E-CKPT-QUANT-MISSING"), (transpose("down_proj.weight_scale"), "E-CKPT-QUANT-SHAPE"),
    (transpose("down_proj.weight_packed"), "E-CKPT-QUANT-SHAPE"),
    (add(f"{PLACE}.weight_zero_point", torch.zeros(3, 3, dtype=torch.int32)), "E-CKPT-QUANT-SHAPE"),
    (add(f"{PLACE}.weight_g_idx", torch.zeros(96, dtype=torch.int32)), "E-CKPT-QUANT-VALUE"),
    (add(f"{PLACE}.weight_shape", torch.tensor([64, 64])), "E-CKPT-QUANT-SHAPE"),
    (add(f"{PLACE}.weight", torch.ones(64, 96)), "E-CKPT-QUANT-ORPHAN"),
    (add("model.embed_tokens.weight_scale", torch.ones(72, 1)), "E-CKPT-QUANT-ORPHAN"),
    (add(f"{PLACE}.pre_quant_scale", torch.ones(96)), "E-CKPT-QUANT-ORPHAN"),
    (add(f"{PLACE}.weight_scale_2", torch.ones(1)), "E-CKPT-QUANT-ORPHAN"),
    (add(f"{PLACE}.meta", torch.ones(4, dtype=torch.int16)), "E-CKPT-QUANT-ORPHAN"),
    (lambda tensors: tensors.update({first(tensors, "weight_packed"): torch.zeros(64, 32, dtype=torch.uint8)}),
     "E-CKPT-QUANT-DTYPE")])
def test_tensors_that_are_missing_left_over_or_of_another_shape(tmp_path: Path, do, code: str) -> None:
    write_quantized(tmp_path, entry("pack-quantized"), packed(4))
    with refused(code, InvalidCheckpoint):
        open_checkpoint(change(tmp_path, do))


@pytest.mark.parametrize("scheme", [{"num_bits": 8}, {"group_size": 64}, {"group_size": 16}])
def test_a_description_of_other_bits_or_blocks_is_refused(tmp_path: Path, scheme: dict) -> None:
    write_quantized(tmp_path, entry("pack-quantized"), packed(4))
    edit(tmp_path, quantization_config=entry("pack-quantized", **scheme))
    with refused("E-CKPT-QUANT-SHAPE", InvalidCheckpoint):
        open_checkpoint(tmp_path)


def test_scales_of_a_quantized_cache_are_noted(tmp_path: Path) -> None:
    write_quantized(tmp_path, entry("pack-quantized"), packed(4))
    change(tmp_path, lambda tensors: tensors.update({f"model.layers.0.self_attn.{part}_scale": torch.ones(1)
                                                     for part in "kv"}))
    assert any("cache" in note and "k_scale" in note for note in open_checkpoint(tmp_path).notes)
