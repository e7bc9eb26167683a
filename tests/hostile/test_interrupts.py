"""Whatever stops an export, the old bundle or the new one is there, whole: SIGKILL, SIGINT, a full disk."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from refusal import refused

from gqa_export.bundle.integrity import check_files
from gqa_export.bundle.manifest import MANIFEST, MODEL, FileFact, Manifest, read_manifest
from gqa_export.bundle.writer import HashingFile, writing_bundle
from gqa_export.files.staging import writing_folder
from gqa_export.spec import ModelSpec

pytestmark = pytest.mark.whole_model

SPEC = ModelSpec("x", "X", 5, 6, 8, "", ())
FILES = 6

# Writes bundle after bundle over the same output; each one is told by its capacity and by every byte of its files.
WRITER = '''
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may be started with it ignored
from pathlib import Path
from gqa_export.bundle.manifest import MODEL, Manifest, read_manifest
from gqa_export.bundle.writer import writing_bundle
from gqa_export.spec import ModelSpec
output, inplace = Path(sys.argv[1]), sys.argv[2] == "inplace"
version = int(sys.argv[3])
if not inplace:
    read_manifest(output)  # loads what reads manifests, which takes longer than a bundle
print("ready", flush=True)
while True:
    version += 1
    with writing_bundle(output, force=True, inplace=inplace) as writer:
        for name in [MODEL, *(f"part{i}" for i in range(5))]:
            writer.write(name, bytes([version % 251]) * 50_000)
        spec = ModelSpec("x", "X", 5, 6, 8, "", ())
        writer.finish(Manifest("ort", "float32", "growing", version, "all", "copy", spec, (), ()))
'''


def content(folder: Path) -> int:
    """The version that a folder holds: all of its files of one version, with true hashes."""
    manifest = read_manifest(folder)
    assert len(manifest.files) == FILES
    for name, fact in manifest.files.items():
        data = (folder / name).read_bytes()
        assert set(data) == {manifest.capacity % 251}, f"{name} is of another version than the manifest"
        assert len(data) == fact.size
    assert {path.name for path in folder.iterdir()} == {*manifest.files, MANIFEST}
    return manifest.capacity


def write(output: Path, version: int, **options) -> None:
    with writing_bundle(output, force=True, **options) as writer:
        for name in [MODEL, *(f"part{i}" for i in range(FILES - 1))]:
            writer.write(name, bytes([version % 251]) * 50_000)
        writer.finish(Manifest("ort", "float32", "growing", version, "all", "copy", SPEC, (), ()))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_killed_at_a_random_moment_the_old_bundle_or_the_new_one_is_there(tmp_path, how):
    moments, seen = random.Random(7), set()
    output, version = tmp_path / "bundle", 2
    write(output, 1)
    began = time.perf_counter()
    write(output, version)  # waits for the disk, whose speed decides when a bundle is replaced
    longest = 0.06 + 6 * (time.perf_counter() - began)
    for _ in range(12):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(output), "whole", str(version)],
                                 stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert child.stdout.readline() == b"ready\n"
        time.sleep(moments.uniform(0, longest))
        child.send_signal(how)
        try:
            child.wait(timeout=30)
        finally:
            child.kill()
        now = content(output)
        assert now >= version
        seen.add(now > version)
        version = now
        if how == signal.SIGINT:
            assert [path.name for path in tmp_path.iterdir()] == ["bundle"], "a caught interrupt leaves nothing beside"
    assert True in seen, "no kill came after a bundle was replaced: the moments are too early"
    write(output, version + 1)  # and the way is free
    assert content(output) == version + 1
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"], "what kills left behind is gone with the next"


def test_interrupted_inside_a_checkpoint_folder_the_earlier_files_are_back(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path, 1, inplace=True)
    real, moved = os.replace, []

    def interrupted(source, place):
        if len(moved) == 3:
            moved.append(None)
            raise KeyboardInterrupt
        moved.append(place)
        real(source, place)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 2, inplace=True)
    monkeypatch.setattr(os, "replace", real)
    (tmp_path / "config.json").unlink()
    assert content(tmp_path) == 1


def test_killed_inside_a_checkpoint_folder_a_mixture_is_never_taken_for_a_bundle(tmp_path):
    """Files there are replaced one by one; the manifest, which vouches for them, comes last."""
    write(tmp_path, 1, inplace=True)
    (tmp_path / MODEL).write_bytes(b"\x02" * 50_000)  # killed after the first file of another export
    with refused("E-BUNDLE-HASH"):
        check_files(tmp_path, read_manifest(tmp_path), hashes=False)


def full_disk(limit: int, number: int):
    """A `write` that fails after `limit` bytes in all."""
    real, written = HashingFile.write, [0]

    def write_some(self, data):
        written[0] += len(data)
        if written[0] > limit:
            raise OSError(number, os.strerror(number))
        return real(self, data)

    return write_some


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ids=errno.errorcode.get)
@pytest.mark.parametrize("limit", [0, 60_000, 290_000])
def test_a_disk_that_fills_up_leaves_the_old_bundle_and_nothing_beside_it(tmp_path, monkeypatch, limit, number):
    output = tmp_path / "bundle"
    write(output, 1)
    monkeypatch.setattr(HashingFile, "write", full_disk(limit, number))
    with refused("E-FILE-DISK-FULL") as refusal:
        write(output, 2)
    assert refusal.error.exit_code == 2
    assert content(output) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_real_limit_on_file_size_is_told_as_a_full_disk(tmp_path):
    """The system itself refuses to write on: no stand-in for the error."""
    output = tmp_path / "bundle"
    write(output, 1)
    code = ("import resource, signal, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nsys.argv = ['x', sys.argv[1], 'whole', '1']\n" + WRITER)
    done = subprocess.run([sys.executable, "-c", code, str(output)], capture_output=True, text=True, timeout=60)
    assert "GqaExportError: the disk is full" in done.stderr
    assert content(output) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_folders_of_other_verbs_are_exchanged_the_same_way(tmp_path, monkeypatch):
    output = tmp_path / "result"
    for version in ("1", "2"):
        with writing_folder(output, force=True, marker="marker") as staging:
            (staging / "marker").write_text(version)
        assert (output / "marker").read_text() == version
    # a file system that cannot exchange names
    monkeypatch.setattr("gqa_export.files.atomic_replace.exchange", lambda *_: False)
    with writing_folder(output, force=True, marker="marker") as staging:
        (staging / "marker").write_text("3")
    assert (output / "marker").read_text() == "3"
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_replaced_bundle_is_never_missing_while_it_is_replaced(tmp_path):
    """Somebody who looks all the time always finds a manifest there."""
    output, version = tmp_path / "bundle", 1
    write(output, version)
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(output), "whole", "1"], stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL)
    assert child.stdout.readline() == b"ready\n"
    began, looks = time.monotonic(), 0
    try:
        while time.monotonic() < began + 1.5 or (read_manifest(output).capacity <= 3 and time.monotonic() < began + 30):
            assert os.path.exists(output / MANIFEST), "the bundle was gone for a moment"
            looks += 1
    finally:
        child.kill()
        child.wait(timeout=30)
    assert looks > 1000
    assert content(output) > 3


def test_file_facts_are_what_was_written(tmp_path):
    write(tmp_path / "bundle", 9)
    manifest = read_manifest(tmp_path / "bundle")
    skipped = check_files(tmp_path / "bundle", manifest, hashes=False)
    assert skipped == [name for name in manifest.files if name != MODEL]
    assert all(isinstance(fact, FileFact) and len(fact.sha256) == 64 for fact in manifest.files.values())
