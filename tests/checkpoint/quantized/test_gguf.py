"""GGUF files keep their codes: every matrix has the very values that the model is loaded with, under transformers'
name and in the order of rows that transformers has."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np
import pytest
from ggml_bytes import stored_rows
from gguf_models import RMS, SIZES, case, tensors_of, write_case
from refusal import refused

from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.checkpoint.quantized.ggml_blocks import BLOCK_TYPES
from gqa_export.errors import InvalidCheckpoint

WIDE = {"feed_forward_length": 64, "expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 32}
NUMBERS = {block.name: number for number, block in BLOCK_TYPES.items()}


def state_of(path: Path, dtype: str = "fp64") -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in load_model(
        open_checkpoint(path), dtype).state_dict().items()}


def write_mixed(path: Path, types: dict[str, str], keys: dict | None = None) -> dict[str, tuple[int, np.ndarray]]:
    """A llama whose tensors have each a type of its own, `types` by the middle of the name; gives the stored rows."""
    keys = {**SIZES, **RMS, "embedding_length": 256, "feed_forward_length": 256, "block_count": 1, **(keys or {})}
    writer, stored = gguf.GGUFWriter(path, "llama"), {}
    for key, value in keys.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"llama.{key}", value)
    shapes = {"token_embd": (61, 256), "output": (61, 256), "blk.0.attn_q": (256, 256), "blk.0.attn_k": (128, 256),
              "blk.0.attn_v": (128, 256), "blk.0.attn_output": (256, 256), "blk.0.ffn_gate": (256, 256),
              "blk.0.ffn_up": (256, 256), "blk.0.ffn_down": (256, 256)}
    for place, (stem, (rows, columns)) in enumerate(shapes.items()):
        number = NUMBERS[types.get(stem.rpartition(".")[2], types[""])]
        block = BLOCK_TYPES[number]
        raw = stored_rows(block.name, block.size, rows, columns // block.elements, place)
        if block.name == "MXFP4":
            raw.reshape(-1, block.size)[:, 0] = 120
        stored[f"{stem}.weight"] = number, raw
        writer.add_tensor(f"{stem}.weight", raw, raw_dtype=gguf.GGMLQuantizationType(number))
    for norm in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{norm}.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


MIXED = {"": "Q4_K", "token_embd": "Q6_K", "output": "Q8_0", "attn_q": "Q5_K", "attn_k": "IQ4_XS", "attn_v": "Q3_K",
         "attn_output": "Q2_K", "ffn_gate": "MXFP4", "ffn_down": "Q5_0"}


def test_types_mixed_within_a_layer_are_each_kept(tmp_path: Path) -> None:
    stored = write_mixed(tmp_path / "model.gguf", MIXED)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    found, state = checkpoint.quantized, state_of(tmp_path / "model.gguf")
    assert checkpoint.quantization == "GGUF IQ4_XS, MXFP4, Q2_K, Q3_K, Q4_K, Q5_0, Q5_K, Q6_K, Q8_0"
    assert {name for name, value in state.items() if value.ndim > 1} == set(found)
    assert found["model.layers.0.self_attn.q_proj.weight"].label == "GGUF Q5_K"
    assert found["model.layers.0.mlp.gate_proj.weight"].kind == "e2m1"
    for name, matrix in found.items():
        np.testing.assert_array_equal(matrix.parameter(), state[name], err_msg=name)
    for name, stem in (("lm_head", "output"), ("model.layers.0.mlp.down_proj", "blk.0.ffn_down")):
        number, raw = stored[f"{stem}.weight"]
        values = gguf.dequantize(raw, gguf.GGMLQuantizationType(number))
        np.testing.assert_array_equal(found[f"{name}.weight"].dequantize().astype(np.float32), values)
    number, raw = stored["blk.0.attn_q.weight"]
    values = gguf.dequantize(raw, gguf.GGMLQuantizationType(number)).reshape(4, 32, 2, 256).swapaxes(1, 2)
    np.testing.assert_allclose(found["model.layers.0.self_attn.q_proj.weight"].dequantize(), values.reshape(256, 256),
                               rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("name", "stored"), [
    ("llama", "Q4_1"), ("llama joined", "Q5_1"), ("qwen2moe", "Q4_0"), ("qwen3moe", "Q8_0"), ("phi3", "Q4_1"),
    ("gemma2", "Q5_0"), ("nemotron", "Q8_0")])
def test_families_with_rows_in_other_orders_and_joined_matrices(tmp_path: Path, name: str, stored: str) -> None:
    architecture, keys, _ = case(name)
    options = {"tied": 1} if name == "gemma2" else {"joined": 1} if name == "llama joined" else {}
    tensors = tensors_of(architecture, {**keys, **{key: size for key, size in WIDE.items() if key in keys}}, options)
    path = write_case(tmp_path / "model.gguf", name, {key: size for key, size in WIDE.items() if key in keys},
                      tensors, stored=gguf.GGMLQuantizationType[stored])
    found, state = open_checkpoint(path).quantized, state_of(path)
    plain = {name for name, value in state.items() if value.ndim > 1} - set(found)
    assert all(name == "lm_head.weight" or name.endswith("shared_expert_gate.weight") for name in plain)
    for name, matrix in found.items():
        assert matrix.parameter_shape == state[name].shape
        np.testing.assert_array_equal(matrix.parameter(), state[name], err_msg=name)
    single = state_of(path, "fp32")
    assert all(np.array_equal(single[name], value.astype(np.float32)) for name, value in state.items())


def test_joined_matrices_of_different_types_are_left_to_their_values(tmp_path: Path) -> None:
    from gqa_export.checkpoint.gguf_facts import GgufFacts
    from gqa_export.checkpoint.gguf_header import read_gguf_header
    from gqa_export.checkpoint.quantized.gguf import _joined
    from gqa_export.checkpoint.quantized.gguf_tensor import stored_matrix

    write_mixed(tmp_path / "model.gguf", MIXED)
    header = read_gguf_header(tmp_path / "model.gguf")
    facts = GgufFacts(header)
    object.__setattr__(facts, "family", type("Joined", (), {"joined": True, "experts": False}))
    parts = {f"model.layers.0.self_attn.{part}_proj.weight": stored_matrix(header, f"blk.0.attn_{part}.weight")
             for part in "qkv"}
    assert _joined(facts, parts) == {}  # type: ignore[arg-type]


def test_a_plain_file_has_none(tmp_path: Path) -> None:
    path = write_case(tmp_path / "model.gguf", "llama")
    checkpoint = open_checkpoint(path)
    assert not checkpoint.quantized
    assert checkpoint.quantization == ""


def test_rows_that_are_not_whole_blocks_are_refused(tmp_path: Path) -> None:
    _, _, tensors = case("llama")
    path = write_case(tmp_path / "model.gguf", "llama", tensors={name: np.resize(value, (64, 32)) if "ffn_gate" in name
                                                                 else value for name, value in tensors.items()})
    raw = bytearray(path.read_bytes())
    at = raw.index(b"blk.0.ffn_gate.weight") + len(b"blk.0.ffn_gate.weight")
    raw[at : at + 4 + 16 + 4] = (2).to_bytes(4, "little") + (64).to_bytes(8, "little") + math.prod((32,)).to_bytes(
        8, "little") + (14).to_bytes(4, "little")
    path.write_bytes(raw)
    with refused("E-CKPT-QUANT-SHAPE", InvalidCheckpoint):
        open_checkpoint(path)
