"""Weights that are written while the model is traced: the same file, or none; and no thread that stays."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from refusal import refused
from safetensors.numpy import save_file

from gqa_export.bundle.manifest import DATA
from gqa_export.bundle.writer import HashingFile, staged_bundle
from gqa_export.checkpoint.safetensors_header import read_header
from gqa_export.errors import InvalidCheckpoint
from gqa_export.weights import ahead as ahead_module
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


@contextmanager
def ahead_in(output, streams):
    """(a writer of a bundle, the thread that writes these streams into it)."""
    with staged_bundle(output, claim=False) as writer, WrittenAhead(writer, DATA, streams) as ahead:
        ahead.start()
        yield writer, ahead


def ended(ahead):
    """Wait until the thread has met what it meets."""
    ahead._thread.join(30)
    assert not running()


def running():
    return [thread for thread in threading.enumerate() if thread.name == "weights-ahead"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_file_is_the_one_that_would_be_written_now(tmp_path, stored, dtype):
    streams = streams_of(stored, "b", "ca", dtype=dtype)
    data, fact = written(streams, tmp_path / "plain")
    assert data[:60 if dtype == "float32" else 30] != bytes(60)
    told = []
    with ahead_in(tmp_path / "out", streams) as (writer, ahead):
        assert ahead.take(streams_of(stored, "b", "ca", dtype=dtype), told.append)
        assert not running()
        assert (writer.staging / DATA).read_bytes() == data
        assert writer.files == {DATA: fact}
        assert fact.sha256 == hashlib.sha256(data).hexdigest()
        assert [path.name for path in writer.staging.iterdir()] == [DATA]
    assert told == sorted(told)


@pytest.mark.parametrize("other", [("ca", "b"), ("b", "c", "a"), ("b",)], ids=["order", "joined", "fewer"])
def test_another_file_than_the_graph_asks_for_is_removed(tmp_path, stored, other):
    with ahead_in(tmp_path / "out", streams_of(stored, "b", "ca")) as (writer, ahead):
        assert not ahead.take(streams_of(stored, *other), lambda done: None)
        assert not running()
        assert list(writer.staging.iterdir()) == []
        assert writer.files == {}


def test_a_checkpoint_that_changes_meanwhile_is_read_again(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones((3, 5), np.float32)}, path)
    streams = streams_of(read_header(path), "a")
    with ahead_in(tmp_path / "out", streams) as (writer, ahead):
        time.sleep(0.01)
        save_file({"a": np.zeros((3, 5), np.float32)}, path)
        assert not ahead.take(streams, lambda done: None)
        assert list(writer.staging.iterdir()) == []


def full_disk(monkeypatch, where):
    """Let a method of files that are written fail for want of space; gives a list with an entry for each time."""
    times, real = [], getattr(HashingFile, where)

    def full(self, *arguments):
        times.append(where)
        if where == "close":
            real(self)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(HashingFile, where, full)
    return times


@pytest.mark.parametrize("where", ["write", "sync", "close"])
def test_a_disk_that_is_full_is_told_where_the_file_is_asked_for_and_not_filled_twice(tmp_path, stored, monkeypatch,
                                                                                      where):
    times = full_disk(monkeypatch, where)
    with ahead_in(tmp_path / "out", streams_of(stored, "b", "ca")) as (writer, ahead):
        ended(ahead)
        with pytest.raises(OSError, match="No space"):
            ahead.take(streams_of(stored, "b", "ca"), lambda done: None)
        assert times == [where], "an export of hours is not begun again"
        assert list(writer.staging.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["write", "sync", "close"])
def test_what_happens_to_a_file_that_nobody_wants_stops_nothing(tmp_path, stored, monkeypatch, where):
    full_disk(monkeypatch, where)
    with ahead_in(tmp_path / "out", streams_of(stored, "b", "ca")) as (writer, ahead):
        ended(ahead)
        assert not ahead.take(streams_of(stored, "ca", "b"), lambda done: None)
        assert list(writer.staging.iterdir()) == []


def test_a_file_is_closed_and_its_journal_gone_when_the_last_bytes_find_no_room(tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file = file

        def close(self):
            self.file.close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = HashingFile(tmp_path / "data", "key")
    file._file = Full(file._file)
    with pytest.raises(OSError, match="No space"):
        file.close()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_weights_that_cannot_be_read_are_read_once_and_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones((3, 5), np.float32)}, path)
    streams = streams_of(read_header(path), "a")
    os.truncate(path, path.stat().st_size - 4)
    with ahead_in(tmp_path / "out", streams) as (writer, ahead):
        with refused("E-WEIGHTS-FILE-CHANGED", InvalidCheckpoint):
            ahead.take(streams, lambda done: None)
        assert list(writer.staging.iterdir()) == []


def test_a_value_that_the_type_does_not_hold_is_met_once_and_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones((3, 5), np.float32), "b": np.full((3, 5), 7e4, np.float32)}, path)
    streams = streams_of(read_header(path), "a", "b", dtype="float16")
    told = []
    with ahead_in(tmp_path / "out", streams) as (writer, ahead):
        with refused("E-WEIGHTS-OVERFLOW"):
            ahead.take(streams, told.append)
        assert list(writer.staging.iterdir()) == []
    assert told == sorted(told), "progress does not go back"


def test_the_disk_is_waited_for_now_and_then_so_that_an_interrupt_is_not_the_one_that_waits(tmp_path, stored,
                                                                                            monkeypatch):
    synced, real = [], HashingFile.sync

    def sync(self):
        synced.append(self.tell())
        real(self)

    monkeypatch.setattr(HashingFile, "sync", sync)
    monkeypatch.setattr(ahead_module, "SYNC_BYTES", 4 << 20)
    streams = streams_of(stored, "a", "b", "c")
    with ahead_in(tmp_path / "out", streams) as (_, ahead):
        ended(ahead)
        assert ahead.take(streams, lambda done: None)
    # two chunks of 4 MiB, and what is left
    assert synced == [4 << 20, 8 << 20, streams[-1].offset + streams[-1].nbytes]


def test_a_thread_that_was_never_started_wrote_nothing(tmp_path, stored):
    """Ctrl-C may come before it is."""
    streams = streams_of(stored, "b")
    with staged_bundle(tmp_path / "out", claim=False) as writer:
        with WrittenAhead(writer, DATA, streams):
            pass
        with WrittenAhead(writer, DATA, streams) as ahead:
            assert not ahead.take(streams, lambda done: None)


def test_a_thread_that_begins_when_its_folder_is_gone_does_not_make_it_again(tmp_path, stored):
    with staged_bundle(tmp_path / "out", claim=False) as writer:
        pass
    ahead = WrittenAhead(writer, DATA, streams_of(stored, "b"))
    ahead.start()
    ended(ahead)
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_a_file_already_is_reported_in_one_step(tmp_path, stored):
    """Progress counts its pace from the first report on, and would take each further step for work."""
    streams = streams_of(stored, "a", "b", "c")
    data, _ = written(streams, tmp_path / "plain")
    file, told = HashingFile(tmp_path / "begun"), []
    file.write(data[:streams[2].offset])
    write_streams(file, streams, told.append)
    assert told == [streams[0].nbytes + streams[1].nbytes, sum(stream.nbytes for stream in streams)]
    file.close()
    assert (tmp_path / "begun").read_bytes() == data


class Interrupted(BaseException):
    """Ctrl-C is a BaseException too."""


@pytest.mark.parametrize("where", ["before it is asked for", "while it is waited for"])
def test_an_interrupted_export_leaves_no_thread_and_no_file(tmp_path, stored, monkeypatch, where):
    slow, real = threading.Event(), HashingFile.write

    def write(self, data):
        slow.set()
        time.sleep(0.05)
        return real(self, data)

    def interrupt(done=0):
        raise Interrupted

    streams = streams_of(stored, "a", "b", "c")
    monkeypatch.setattr(HashingFile, "write", write)

    def export():
        with ahead_in(tmp_path / "deep" / "out", streams) as (_, ahead):
            assert slow.wait(5)
            assert running()
            if where == "before it is asked for":
                interrupt()
            ahead.take(streams, interrupt)

    with pytest.raises(Interrupted):
        export()
    assert not running()
    assert list(tmp_path.iterdir()) == [], "the folder that was made for the output is gone too"
