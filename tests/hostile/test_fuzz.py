"""Damaged and malicious bytes into every reader of a file from outside: either it is read, and then it is whole, or it
is refused with a GqaExportError. Nothing else may come out, and nothing may take long.
"""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusal import refused
from safetensors.numpy import save

from gqa_export.bundle.integrity import check_files
from gqa_export.bundle.manifest import FileFact, Manifest
from gqa_export.bundle.manifest_rules import inside
from gqa_export.checkpoint.gguf_header import read_gguf_header
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.checkpoint.safetensors_header import read_header
from gqa_export.checkpoint.tokenizer import token_ids
from gqa_export.errors import GqaExportError, InvalidCheckpoint
from gqa_export.graph_io import graph_inputs, graph_outputs
from gqa_export.report.baseline import Baseline
from gqa_export.spec import LARGEST, AttentionSpec, ModelSpec

FUZZ = settings(max_examples=100, deadline=2000, derandomize=True, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

SPEC = ModelSpec("llama", "LlamaForCausalLM", 64, 32, 128, "default",
                 tuple(AttentionSpec(i, 4, 2, 8, 8, 0.35, window=16 * i) for i in range(2)))
MANIFEST = Manifest("ort", "float32", "growing", 64, "all", "copy", SPEC, graph_inputs(SPEC, "float32", "growing"),
                    graph_outputs(SPEC, "float32", "growing", "all"), files={"model.onnx": FileFact(10, "0" * 64)},
                    tokens={"eos": [2], "bos": 1, "pad": None}).to_json()
SAFETENSORS = save({"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b.weight": np.ones((2, 2), np.float16)})

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["..", "/etc/passwd", "\x00", "\ud800", "model.onnx", "float32", 1 << 63, -1, 0]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=8)


def paths_of(data, here=()):
    """Every place in a JSON document."""
    yield here
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from paths_of(value, (*here, key))


MANIFEST_PATHS = [path for path in paths_of(json.loads(MANIFEST)) if path]


def replaced(path, value) -> str:
    """The manifest with the value at a place replaced, or (for Ellipsis) removed."""
    data = json.loads(MANIFEST)
    owner = data
    for key in path[:-1]:
        owner = owner[key]
    if value is Ellipsis:
        del owner[path[-1]]
    else:
        owner[path[-1]] = value
    return json.dumps(data)


def is_whole(manifest: Manifest) -> None:
    """What every reader of a manifest relies on."""
    assert 1 <= manifest.capacity <= LARGEST
    assert manifest.cache in ("growing", "static")
    assert manifest.logits in ("all", "last")
    for layer in manifest.spec.layers:
        assert layer.num_heads % layer.kv_num_heads == 0
        assert 0 < layer.cache_bytes_per_token(8) < 1 << 63
        assert np.isfinite(layer.scale)
    assert all(inside(name) and fact.size >= 0 for name, fact in manifest.files.items())
    json.loads(manifest.to_json(), parse_constant=lambda word: pytest.fail(word))
    hash(manifest.spec)


def test_the_undamaged_ones_are_read(tmp_path):
    is_whole(Manifest.from_json(MANIFEST))
    (tmp_path / "x.safetensors").write_bytes(SAFETENSORS)
    assert set(read_header(tmp_path / "x.safetensors")) == {"a", "b.weight"}
    (tmp_path / "x.gguf").write_bytes(gguf())
    assert set(read_gguf_header(tmp_path / "x.gguf").tensors) == {"t0", "t1"}


@FUZZ
@given(path=st.sampled_from(MANIFEST_PATHS), value=JSON | st.just(Ellipsis))
def test_a_manifest_with_any_value_changed(path, value):
    with suppress(GqaExportError):
        is_whole(Manifest.from_json(replaced(path, value)))


@FUZZ
@given(JSON.map(json.dumps) | st.text(max_size=40))
def test_a_manifest_that_is_any_text(text):
    with pytest.raises(GqaExportError):
        Manifest.from_json(text)


@FUZZ
@given(path=st.sampled_from(MANIFEST_PATHS), value=JSON | st.just(Ellipsis))
def test_checking_the_files_of_any_manifest_refuses(path, value, tmp_path):
    """The folder holds another model.onnx than any manifest here can vouch for: nothing may pass."""
    (tmp_path / "model.onnx").write_bytes(b"0123456789")
    try:
        manifest = Manifest.from_json(replaced(path, value))
    except GqaExportError:
        return
    with pytest.raises(GqaExportError):
        check_files(tmp_path, manifest)


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """Bytes flipped, numbers replaced by extreme ones, cut off, doubled."""
    at = st.integers(0, len(whole) - 1)
    extreme = st.sampled_from([0, 1, 255, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1])

    def flip(places):
        data = bytearray(whole)
        for place, byte in places:
            data[place] = byte
        return bytes(data)

    return (st.lists(st.tuples(at, st.integers(0, 255)), min_size=1, max_size=6).map(flip)
            | st.tuples(at, extreme).map(lambda p: (whole[: p[0]] + struct.pack("<Q", p[1]) + whole[p[0] + 8:]))
            | at.map(lambda n: whole[:n]) | at.map(lambda n: whole + whole[n:]) | st.binary(max_size=64))


@FUZZ
@given(damaged(SAFETENSORS))
def test_a_damaged_safetensors_file(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with suppress(GqaExportError):
        tensors = read_header(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) < len(data)
        for tensor in tensors.values():
            assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(data)
            assert tensor.nbytes == int(np.prod(tensor.shape)) * (tensor.nbytes // max(1, int(np.prod(tensor.shape))))


@FUZZ
@given(JSON)
def test_a_safetensors_header_of_any_json(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(GqaExportError):
        read_header(tmp_path / "x.safetensors")


def gguf(*, alignment: bytes = struct.pack("<II", 4, 32), names=(b"t0", b"t1"), kinds=(0, 0), offsets=(0, 64),
         dims=((4, 2), (8,)), size=96) -> bytes:
    """A GGUF file of two fp32 tensors. alignment: type and value of that metadata entry."""
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    data = b"GGUF" + struct.pack("<IQQ", 3, len(names), 3)
    data += text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    data += text(b"general.alignment") + alignment
    data += text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"b")
    for name, kind, offset, shape in zip(names, kinds, offsets, dims):
        data += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", kind, offset)
    return data + bytes(-len(data) % 32) + bytes(size)


GGUF = gguf()


@FUZZ
@given(damaged(GGUF))
def test_a_damaged_gguf_file(tmp_path, data):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with suppress(GqaExportError):
        header = read_gguf_header(path)
        assert isinstance(header.stored_dtype, str)
        assert isinstance(header.architecture, str)
        for _, shape in header.tensors.values():
            assert all(size >= 0 for size in shape)


@pytest.mark.parametrize(("change", "code", "named"), [
    ({"alignment": struct.pack("<II", 4, 0)}, "E-CKPT-GGUF-HEADER", "alignment 0"),
    ({"alignment": struct.pack("<II", 4, 33)}, "E-CKPT-GGUF-HEADER", "alignment 33"),
    ({"alignment": struct.pack("<If", 6, 32.0)}, "E-CKPT-GGUF-HEADER", "alignment 32.0"),
    ({"alignment": struct.pack("<IQ", 8, 2) + b"32"}, "E-CKPT-GGUF-HEADER", "alignment '32'"),
    ({"names": (b"t0", b"t0")}, "E-CKPT-GGUF-HEADER", "'t0' occurs twice"),
    ({"offsets": (0, 0)}, "E-CKPT-GGUF-HEADER", "'t1' at 0"),
    ({"offsets": (0, 65)}, "E-CKPT-GGUF-HEADER", "'t1' at 65"),
    ({"offsets": (0, 1 << 60)}, "E-CKPT-TRUNCATED", "'t1'"),
    ({"dims": ((1 << 62, 1 << 62), (8,))}, "E-CKPT-TRUNCATED", "'t0'"),
    ({"dims": ((4,) * 9, (8,))}, "E-CKPT-GGUF-HEADER", "9 dimensions"),
    ({"kinds": (0, 2)}, "E-CKPT-GGUF-HEADER", "8 values"),
    ({"kinds": (0, 4321)}, "E-CKPT-GGUF-HEADER", "4321"),
    ({"size": 16}, "E-CKPT-TRUNCATED", "'t0'"),
], ids=str)
def test_a_gguf_file_that_contradicts_itself_is_refused(tmp_path, change, code, named):
    (tmp_path / "x.gguf").write_bytes(gguf(**change))
    with refused(code, InvalidCheckpoint) as refusal:
        read_gguf_header(tmp_path / "x.gguf")
    assert named in refusal.error.what
    assert refusal.error.where == str(tmp_path / "x.gguf")


CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "intermediate_size": 64}


@FUZZ
@given(name=st.sampled_from([*CONFIG, "text_config", "quantization_config", "dtype", "torch_dtype", "eos_token_id"]),
       value=JSON)
def test_opening_a_checkpoint_with_any_value_in_its_configuration(tmp_path, name, value):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, name: value}))
    (tmp_path / "model.safetensors").write_bytes(SAFETENSORS)
    with suppress(GqaExportError):
        opened = open_checkpoint(tmp_path)
        assert opened.stored_dtype == "float32"
        token_ids(opened)


@FUZZ
@given(JSON)
def test_an_index_of_shards_of_any_json(tmp_path, index):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(GqaExportError):
        open_checkpoint(tmp_path)


@FUZZ
@given(JSON)
def test_a_baseline_of_any_json(tmp_path, data):
    (tmp_path / "b.json").write_text(json.dumps({"format": 2, "bundles": data}))
    with suppress(GqaExportError):
        assert isinstance(Baseline.read(Path(tmp_path / "b.json")).bundles, dict)
