"""The strict safetensors reader: finds what is there, refuses everything that is not whole."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusal import refused
from safetensors.numpy import load_file, save_file

from gqa_export.checkpoint.safetensors_header import header_sha256, read_header
from gqa_export.errors import GqaExportError, InvalidCheckpoint


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_tensors_are_found_where_their_bytes_are(tmp_path):
    random = np.random.default_rng(5)
    arrays = {"a": random.normal(size=(3, 5)).astype(np.float32), "b.weight": random.normal(size=7).astype(np.float16),
              "c": random.integers(0, 9, (2, 1, 2)), "empty": np.zeros((0, 4), np.float32),
              "scalar": np.array(3.5)}  # fmt: skip
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    tensors = read_header(tmp_path / "x.safetensors")
    assert set(tensors) == set(arrays)
    data = (tmp_path / "x.safetensors").read_bytes()
    for name, tensor in tensors.items():
        assert (tensor.dtype, tensor.shape) == (arrays[name].dtype.name, arrays[name].shape)
        assert data[tensor.offset : tensor.offset + tensor.nbytes] == arrays[name].tobytes()


@pytest.mark.parametrize(
    ("header", "data", "cause"),
    [
        ({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4), "HEADER-OVERLAP"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6), "HEADER-OVERLAP"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12), "HEADER-HOLE"),
        ({"a": entry(0, 4)}, bytes(8), "HEADER-HOLE"),
        ({"a": entry(0, 8)}, bytes(8), "HEADER-SIZE"),
        ({"a": entry(4, 0)}, bytes(8), "HEADER-SIZE"),
        ({"a": entry(0, 4)}, bytes(3), "TRUNCATED"),
        ({"a": entry(0, 4, dtype="F33")}, bytes(4), "HEADER-DTYPE"),
        ({"a": entry(0, 4, dtype=["F32"])}, bytes(4), "HEADER-DTYPE"),
        ({"a": entry(0, 4, shape=(-1, -1))}, bytes(4), "HEADER-SHAPE"),
        ({"a": entry(0, 4, shape=(1.0,))}, bytes(4), "HEADER-SHAPE"),
        ({"a": entry(0, 4, shape=(True,))}, bytes(4), "HEADER-SHAPE"),
        ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), "HEADER-ENTRY"),
        ({"a": 3}, bytes(4), "HEADER-ENTRY"),
        ([1, 2], b"", "HEADER-JSON"),
        (b'{"a": 1, "a": 2}', b"", "HEADER-JSON"),
        (b"{not json", b"", "HEADER-JSON"),
        (b"\xff\xfe{}", b"", "HEADER-JSON"),
        (b"[" * 100_000, b"", "HEADER-JSON"),
    ],
)
def test_a_header_that_does_not_hold_is_refused_naming_the_file(tmp_path, header, data, cause):
    path = write(tmp_path / "bad.safetensors", header, data)
    with refused(f"E-CKPT-{cause}", InvalidCheckpoint) as refusal:
        read_header(path)
    assert refusal.error.where == str(path)
    assert refusal.error.fix


@pytest.mark.parametrize(("length", "code"), [(2**63, "E-CKPT-HEADER-LENGTH"), (5000, "E-CKPT-TRUNCATED")])
def test_an_absurd_header_length_is_refused_before_anything_is_allocated(tmp_path, length, code):
    path = write(tmp_path / "bad.safetensors", {}, length=length)
    with refused(code):
        read_header(path)


def test_a_file_too_short_for_a_length_and_a_missing_file_are_refused(tmp_path):
    (tmp_path / "short.safetensors").write_bytes(b"abc")
    for name, code in (("short.safetensors", "E-CKPT-TRUNCATED"), ("none.safetensors", "E-CKPT-UNREADABLE")):
        with refused(code, InvalidCheckpoint) as refusal:
            read_header(tmp_path / name)
        assert name in refusal.error.where


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_damaged_is_refused_or_still_reads_as_the_library_reads_it(tmp_path, data):
    """Any cut or flipped bytes: our reader raises its own error, or agrees with the safetensors library."""
    path = tmp_path / "fuzzed.safetensors"
    save_file({"a": np.arange(4, dtype=np.float32), "b": np.arange(3, dtype=np.int16)}, path)
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        ours = read_header(path)
    except GqaExportError:
        return
    theirs = load_file(path)
    assert {name: value.shape for name, value in theirs.items()} == {name: entry.shape for name, entry in ours.items()}


def test_the_header_hash_sees_the_header_and_not_the_data(tmp_path):
    for name, value in (("one", 1.0), ("two", 2.0)):
        save_file({"a": np.full(4, value, np.float32)}, tmp_path / name)
    save_file({"b": np.full(4, 1.0, np.float32)}, tmp_path / "three")
    one, two, three = (header_sha256(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two != three
