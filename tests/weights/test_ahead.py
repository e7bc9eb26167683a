"""Weights that are written while the model is traced: the same file, or none; and no thread that stays."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from gqa_export.bundle.manifest import DATA
from gqa_export.bundle.writer import HashingFile, staged_bundle
from gqa_export.checkpoint.safetensors_header import read_header
from gqa_export.weights.ahead import WrittenAhead
from gqa_export.weights.source_kinds import StoredSource
from gqa_export.weights.streams import Stream, write_streams

ROWS = 1 << 19
"""of a matrix of four columns of fp32: two chunks of 4 MiB"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Tensors in a file: a large one, and small ones whose sizes are not those of the alignment."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    generator = np.random.default_rng(5)
    save_file({"a": generator.random((ROWS, 4), np.float32), "b": generator.random((3, 5), np.float32),
               "c": generator.random((7, 5), np.float32)}, path)
    return read_header(path)


def streams_of(stored, *groups, dtype="float32"):
    """A stream of each group of names, at the next multiple of 64."""
    streams, offset = [], 0
    for group in groups:
        offset += -offset % 64
        streams.append(Stream("weights:" + "+".join(group), tuple(StoredSource(stored[name]) for name in group), dtype,
                              [], offset))
        offset += streams[-1].nbytes
    return streams


def written(streams, path):
    """The bytes and facts of these streams, written as ever."""
    file = HashingFile(path)
    write_streams(file, streams, lambda done: None)
    fact = file.close()
    return path.read_bytes(), fact


def running():
    return [thread for thread in threading.enumerate() if thread.name == "weights-ahead"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_file_is_the_one_that_would_be_written_now(tmp_path, stored, dtype):
    streams = streams_of(stored, "b", "ca", dtype=dtype)
    data, fact = written(streams, tmp_path / "plain")
    assert data[:60 if dtype == "float32" else 30] != bytes(60)
    told = []
    with staged_bundle(tmp_path / "out") as writer, WrittenAhead(writer, DATA, streams) as ahead:
        assert ahead.take(streams_of(stored, "b", "ca", dtype=dtype), told.append)
        assert not running()
        assert (writer.staging / DATA).read_bytes() == data
        assert writer.files == {DATA: fact}
        assert fact.sha256 == hashlib.sha256(data).hexdigest()
        assert [path.name for path in writer.staging.iterdir()] == [DATA]
    assert told == sorted(told)


@pytest.mark.parametrize("other", [("ca", "b"), ("b", "c", "a"), ("b",)], ids=["order", "joined", "fewer"])
def test_another_file_than_the_graph_asks_for_is_removed(tmp_path, stored, other):
    with staged_bundle(tmp_path / "out") as writer, WrittenAhead(writer, DATA, streams_of(stored, "b", "ca")) as ahead:
        assert not ahead.take(streams_of(stored, *other), lambda done: None)
        assert not running()
        assert list(writer.staging.iterdir()) == []
        assert writer.files == {}


def test_a_checkpoint_that_changes_meanwhile_is_read_again(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones((3, 5), np.float32)}, path)
    streams = streams_of(read_header(path), "a")
    with staged_bundle(tmp_path / "out") as writer, WrittenAhead(writer, DATA, streams) as ahead:
        time.sleep(0.01)
        save_file({"a": np.zeros((3, 5), np.float32)}, path)
        assert not ahead.take(streams, lambda done: None)
        assert list(writer.staging.iterdir()) == []


def test_a_disk_that_is_full_only_means_that_nothing_is_ahead(tmp_path, stored, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    streams = streams_of(stored, "b", "ca")
    monkeypatch.setattr(HashingFile, "write", full)
    with staged_bundle(tmp_path / "out") as writer, WrittenAhead(writer, DATA, streams) as ahead:
        assert not ahead.take(streams, lambda done: None)
        assert list(writer.staging.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_weights_that_cannot_be_read_only_mean_that_nothing_is_ahead(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones((3, 5), np.float32)}, path)
    streams = streams_of(read_header(path), "a")
    os.truncate(path, path.stat().st_size - 4)
    with staged_bundle(tmp_path / "out") as writer, WrittenAhead(writer, DATA, streams) as ahead:
        assert not ahead.take(streams, lambda done: None)
        assert list(writer.staging.iterdir()) == []


class Interrupted(BaseException):
    """Ctrl-C is a BaseException too."""


@pytest.mark.parametrize("where", ["before it is asked for", "while it is waited for"])
def test_an_interrupted_export_leaves_no_thread_and_no_file(tmp_path, stored, monkeypatch, where):
    slow, real, held_back = threading.Event(), HashingFile.write, []

    def write(self, data):
        held_back.append(sys.platform == "win32" or signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        slow.set()
        time.sleep(0.05)
        return real(self, data)

    def interrupt(done=0):
        raise Interrupted

    streams = streams_of(stored, "a", "b", "c")
    monkeypatch.setattr(HashingFile, "write", write)

    def export():
        with staged_bundle(tmp_path / "deep" / "out") as writer, WrittenAhead(writer, DATA, streams) as ahead:
            assert slow.wait(5)
            assert running()
            if where == "before it is asked for":
                interrupt()
            ahead.take(streams, interrupt)

    with pytest.raises(Interrupted):
        export()
    assert not running()
    assert all(held_back), "a thread that takes Ctrl-C would break into what the main thread may not be torn from"
    assert list(tmp_path.iterdir()) == [], "the folder that was made for the output is gone too"
