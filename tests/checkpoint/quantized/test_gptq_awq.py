"""GPTQ and AWQ: both versions of zero points, told by their values; columns in groups of their own; other layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_checkpoints import change, check, codes_of, edit, first, halves, spread, words, write_quantized
from refusal import refused

from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.errors import InvalidCheckpoint, UnsupportedModel

GROUP = 32


def stream(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Codes along axis 0 as one stream of bits in words of 32, the first in the lowest bits."""
    numbers = [sum(int(code) << bits * place for place, code in enumerate(column)) for column in codes.T]
    count = len(codes) * bits // 8
    raw = np.stack([np.frombuffer(number.to_bytes(count, "little"), "<i4") for number in numbers], axis=1)
    return torch.from_numpy(raw.copy())


def gptq(bits: int = 4, group: int = GROUP, *, stored_less: int = 1, symmetric: bool = True, order: bool = False,
         index: bool = True):
    def encode(rng, rows, columns):
        codes, size = codes_of(rng, rows, columns, bits), group if group > 0 else columns
        blocks = -(-columns // size)
        scale, values = halves(rng, blocks, rows)
        half = 1 << bits - 1
        zero = np.full((blocks, rows), half) if symmetric else np.clip(rng.integers(half - 2, half + 3, (blocks, rows)),
                                                                       1, 2 * half - 1)
        of = rng.permutation(np.arange(columns) // size) if order else np.arange(columns) // size
        parts = {".qweight": stream(codes.T, bits), ".scales": scale,
                 ".qzeros": stream((zero - stored_less).T, bits).T.contiguous()}
        if index:
            parts[".g_idx"] = torch.from_numpy(of.astype(np.int32))
        return parts, (codes - zero[of].T) * values[of].T

    return encode


def entry(bits: int = 4, group: int = GROUP, **more: object) -> dict:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": True, "desc_act": False, **more}


@pytest.mark.parametrize(("bits", "group", "more"), [
    (4, 32, {}), (8, 32, {}), (2, 32, {}), (3, 32, {}), (4, -1, {}), (4, 40, {}), (4, 128, {}),
    (4, 32, {"order": True}),
    (4, 32, {"index": False}), (4, 32, {"symmetric": False}), (3, 32, {"symmetric": False}),
    (8, 32, {"symmetric": False, "order": True})])
def test_gptq(tmp_path: Path, bits: int, group: int, more: dict) -> None:
    values = write_quantized(tmp_path, entry(bits, group, sym=more.get("symmetric", True)), gptq(bits, group, **more))
    for matrix in check(tmp_path, values).values():
        assert (matrix.bits, matrix.block) == (bits, min(group, matrix.columns) if group > 0 else matrix.columns)
        assert matrix.offset == ("none" if more.get("symmetric", True) else "zero")
        assert (matrix.column_order is not None) == ("order" in more)
        assert matrix.scale_dtype == "float16"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("label", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("stored_less", [0, 1])
def test_values_decide_what_is_added_to_zero_points_whatever_the_label_says(tmp_path: Path, stored_less: int, label,
                                                                            symmetric: bool) -> None:
    more = {} if label is None else {"checkpoint_format": label}
    values = write_quantized(tmp_path, entry(sym=symmetric, **more), gptq(stored_less=stored_less, symmetric=symmetric))
    check(tmp_path, values)
    lies = not symmetric and stored_less != (0 if label == "gptq_v2" else 1)
    assert any("version" in note for note in open_checkpoint(tmp_path).notes) == lies


def by_range(bits: int, stored_less: int, mean: float):
    """Codes and zero points of the range of each group of normal weights, as packages round them."""
    def encode(rng, rows, columns):
        weight = rng.normal(mean, 1, (rows, columns // GROUP, GROUP))
        low, high = np.minimum(weight.min(2), 0), np.maximum(weight.max(2), 0)
        most = (1 << bits) - 1
        scale = ((high - low) / most).astype(np.float16)
        step = scale.astype(np.float64)
        zero = np.clip(np.rint(-low / step), 1, most).astype(int)
        codes = np.clip(np.rint(weight / step[..., None]) + zero[..., None], 0, most).astype(int)
        parts = {".qweight": stream(codes.reshape(rows, columns).T, bits), ".scales": torch.from_numpy(scale.T.copy()),
                 ".qzeros": stream(zero - stored_less, bits).T.contiguous()}
        return parts, ((codes - zero[..., None]) * step[..., None]).reshape(rows, columns)

    return encode


@pytest.mark.parametrize(("bits", "mean", "noted"), [
    (4, 0, ""), (4, .02, ""), (3, .02, ""), (8, 0, "does not tell"), (8, .02, "does not tell")])
def test_the_mean_of_weights_outweighs_a_label_only_where_it_tells(tmp_path: Path, bits: int, mean: float,
                                                                   noted: str) -> None:
    for stored_less, label in ((1, "gptq"), (0, "gptq_v2")):  # a step of 8 bits is less than a mean may be
        folder = tmp_path / label
        values = write_quantized(folder, entry(bits, sym=False, checkpoint_format=label),
                                 by_range(bits, stored_less, mean), num_hidden_layers=1)
        check(folder, values)
        notes = open_checkpoint(folder).notes
        assert (noted in notes[0]) if noted else notes == ()
    if bits < 8:
        edit(folder, quantization_config=entry(bits, sym=False))
        check(folder, values)
        assert "version 2" in open_checkpoint(folder).notes[0]


def test_symmetric_weights_tell_the_version_of_those_that_dynamic_makes_asymmetric(tmp_path: Path) -> None:
    def mixed(rng, rows, columns):  # gate_proj and up_proj have 96 rows
        return gptq(8, symmetric=rows != 96, stored_less=0)(rng, rows, columns)

    fields = entry(8, dynamic={"+:.*(gate|up)_proj": {"sym": False}})
    found = check(tmp_path, write_quantized(tmp_path, fields, mixed, num_hidden_layers=1))
    assert {name.split(".")[-2] for name, matrix in found.items() if matrix.offset == "zero"} == {"gate_proj",
                                                                                               "up_proj"}
    assert "those of symmetric weights" in open_checkpoint(tmp_path).notes[0]
    edit(tmp_path, quantization_config=entry(8, dynamic={"+:.*gate_proj": {"sym": False}}))
    with refused("E-CKPT-QUANT-VALUE", InvalidCheckpoint) as refusal:
        open_checkpoint(tmp_path)
    assert "up_proj.qzeros" in refusal.error.what


def test_a_symmetric_checkpoint_with_other_zero_points_is_refused(tmp_path: Path) -> None:
    write_quantized(tmp_path, entry(), gptq(symmetric=False))
    with refused("E-CKPT-QUANT-VALUE", InvalidCheckpoint):
        open_checkpoint(tmp_path)


def test_one_weight_off_by_one_among_symmetric_ones_is_refused(tmp_path: Path) -> None:
    write_quantized(tmp_path, entry(), gptq())

    def off(tensors):
        name = first(tensors, "qzeros")
        tensors[name] = tensors[name] + 0x11111111
    with refused("E-CKPT-QUANT-VALUE", InvalidCheckpoint):
        open_checkpoint(change(tmp_path, off))


def test_old_files_beside_the_configuration_are_read(tmp_path: Path) -> None:
    fields = {key: value for key, value in entry().items() if key != "quant_method"}
    check(tmp_path, write_quantized(tmp_path, fields, gptq(), beside="quantize_config.json"))


def test_numbers_that_are_written_as_texts_or_floats_are_numbers(tmp_path: Path) -> None:
    check(tmp_path, write_quantized(tmp_path, {**entry(), "bits": "4", "group_size": 32.0}, gptq()))
    for wrong in ({"bits": "four"}, {"group_size": 32.5}, {"bits": True}, {"group_size": [32]}):
        edit(tmp_path, quantization_config={**entry(), **wrong})
        with refused("E-CKPT-QUANT-DESCRIPTION", InvalidCheckpoint) as refusal:
            open_checkpoint(tmp_path)
        assert f"{next(iter(wrong))} is {next(iter(wrong.values()))!r}" in refusal.error.what


def test_exceptions_for_some_layers_are_seen_in_the_shapes(tmp_path: Path) -> None:
    def mixed(rng, rows, columns):
        return gptq(8 if rows == 96 else 4, 16 if rows == 96 else GROUP)(rng, rows, columns)

    values = write_quantized(tmp_path, entry(dynamic={"+:.*up_proj": {"bits": 8, "group_size": 16}}), mixed)
    found = check(tmp_path, values)
    assert {(matrix.bits, matrix.block) for matrix in found.values()} == {(4, 32), (8, 16)}
    edit(tmp_path, quantization_config=entry())
    with refused("E-CKPT-QUANT-SHAPE", InvalidCheckpoint):
        open_checkpoint(tmp_path)


def transposed(end: str):
    def do(tensors):
        name = first(tensors, end)
        tensors[name] = tensors[name].T
    return do


def set_to(end: str, value: torch.Tensor):
    return lambda tensors: tensors.update({first(tensors, end): value})


@pytest.mark.parametrize(("do", "code"), [
    (lambda tensors: tensors.pop(first(tensors, "scales")), "E-CKPT-QUANT-MISSING"),
    (lambda tensors: tensors.pop(first(tensors, "qzeros")), "E-CKPT-QUANT-MISSING"),
    (lambda tensors: tensors.pop(first(tensors, "qweight")), "E-CKPT-QUANT-ORPHAN"),
    (lambda tensors: tensors.update({"model.embed_tokens.scales": torch.ones(2, 64)}), "E-CKPT-QUANT-ORPHAN"),
    (transposed("scales"), "E-CKPT-QUANT-SHAPE"), (transposed("qzeros"), "E-CKPT-QUANT-SHAPE"),
    (transposed("down_proj.qweight"), "E-CKPT-QUANT-SHAPE"),
    (set_to("up_proj.g_idx", torch.zeros(64, dtype=torch.int32)), "E-CKPT-QUANT-VALUE"),
    (set_to("up_proj.g_idx", torch.zeros(32, dtype=torch.int32)), "E-CKPT-QUANT-SHAPE"),
    (set_to("up_proj.scales", torch.ones(2, 96, dtype=torch.int32)), "E-CKPT-QUANT-DTYPE")])
def test_tensors_that_are_missing_left_over_or_of_another_shape(tmp_path: Path, do, code: str) -> None:
    write_quantized(tmp_path, entry(), gptq())
    with refused(code, InvalidCheckpoint):
        open_checkpoint(change(tmp_path, do))


@pytest.mark.parametrize("more", [{"group_size": 64}, {"group_size": 16}, {"bits": 8}])
def test_a_description_of_other_bits_or_blocks_is_refused(tmp_path: Path, more: dict) -> None:
    write_quantized(tmp_path, {**entry(), **more}, gptq())
    with refused("E-CKPT-QUANT-SHAPE", InvalidCheckpoint):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("fields", [
    entry(checkpoint_format="marlin"), entry(is_marlin_format=True), {"quant_method": "awq", "version": "gemv"},
    {"quant_method": "awq", "version": "gemm", "zero_point": False}, {"quant_method": "awq", "backend": "llm-awq"},
    {"quant_method": "awq", "bits": 3}, {"quant_method": "auto-round", "packing_format": "auto_round:exllamav3"}])
def test_layouts_that_are_not_read_are_refused_by_name(tmp_path: Path, fields: dict) -> None:
    write_quantized(tmp_path, fields, gptq())
    with refused("E-MODEL-QUANTIZED", UnsupportedModel) as refusal:
        open_checkpoint(tmp_path)
    assert "layout" in refusal.error.what


def awq(group: int = GROUP):
    def pack(codes):  # [K, N]: columns 0 2 4 6 1 3 5 7 of eight, from the lowest nibble up
        return words(codes.reshape(len(codes), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(codes.shape), 4)

    def encode(rng, rows, columns):
        codes = codes_of(rng, rows, columns, 4)
        scale, values = halves(rng, columns // group, rows)
        zero = rng.integers(4, 12, (columns // group, rows))
        return {".qweight": pack(codes.T), ".scales": scale, ".qzeros": pack(zero)}, \
            (codes - spread(zero.T, group, columns)) * spread(values.T, group, columns)

    return encode


@pytest.mark.parametrize("fields", [
    {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "packing_format": "auto_round:auto_awq"}])
def test_awq(tmp_path: Path, fields: dict) -> None:
    for matrix in check(tmp_path, write_quantized(tmp_path, fields, awq())).values():
        assert (matrix.bits, matrix.block, matrix.offset) == (4, GROUP, "zero")
        assert matrix.scale_dtype == "float16"


@pytest.mark.parametrize("fields", [{"quant_method": "awq", "version": "gemv"}, entry(checkpoint_format="marlin"),
                                    {"quant_method": "auto-round", "packing_format": "auto_round:exllamav3"}])
def test_a_layout_that_is_not_read_is_left_over_beside_plain_weights(tmp_path: Path, fields: dict) -> None:
    write_quantized(tmp_path, fields, gptq(), keep=("",))
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.quantized
    assert "left over" in checkpoint.notes[0]


def test_awq_in_the_file_of_an_old_release(tmp_path: Path) -> None:
    fields = {"w_bit": 4, "q_group_size": GROUP, "version": "GEMM", "zero_point": True}
    check(tmp_path, write_quantized(tmp_path, fields, awq(), beside="quant_config.json"))


@pytest.mark.parametrize("do", [transposed("down_proj.qweight"), transposed("scales"), transposed("qzeros")])
def test_awq_of_another_shape(tmp_path: Path, do) -> None:
    write_quantized(tmp_path, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq())
    with refused("E-CKPT-QUANT-SHAPE", InvalidCheckpoint):
        open_checkpoint(change(tmp_path, do))
