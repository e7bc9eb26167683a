"""Is what a killed export left taken up again, and only if it is exactly what would be written?"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import gqa_models
import pytest
from refusal import refused
from safetensors.numpy import load_file, save_file

from gqa_export.bundle.manifest import DATA
from gqa_export.bundle.writer import writing_bundle
from gqa_export.exporting import to_onnx
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.files import resume

pytestmark = pytest.mark.whole_model

KILLED = """
import os, sys, time
from gqa_export.bundle.writer import HashingFile
from gqa_export.files import resume
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
resume.EVERY_BYTES = 4096
most, write = 0.7 * os.path.getsize(sys.argv[1] + "/model.safetensors") / 2, HashingFile.write
def slow(self, data):
    if self.size > most and self.path.name == "model.onnx.data":
        print("far enough", flush=True)
        time.sleep(60)
    return write(self, data)
HashingFile.write = slow
export_onnx(sys.argv[1], sys.argv[2], ExportOptions(dtype="fp16"))
"""


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A folder with a checkpoint, `model`, and what an export of it to `out` left that was killed when most weights
    were written."""
    root = tmp_path_factory.mktemp("killed")
    folder = gqa_models.write_tiny("llama", root / "model")
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(folder), str(root / "out")], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"far enough\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    return root


@pytest.fixture(scope="module")
def whole(left, tmp_path_factory):
    """The same export, undisturbed."""
    folder = tmp_path_factory.mktemp("whole") / "bundle"
    return export_onnx(left / "model", folder, ExportOptions(dtype="fp16")), (folder / DATA).read_bytes()


@pytest.fixture
def killed(left):
    """The checkpoint and the place of the export that was killed, as it was left."""
    kept = left.with_name(f"{left.name}-kept")
    if kept.exists():
        shutil.rmtree(left)  # where the test before worked: a journal names its checkpoint by its place
    else:
        shutil.copytree(left, kept)
    shutil.copytree(kept, left, dirs_exist_ok=True)
    return left / "model", left / "out"


def partials(out):
    """Staging folders, and lock files that no folder belongs to."""
    found = sorted(path.name for path in out.parent.glob(f".{out.name}.partial-*"))
    return [name for name in found if name.removesuffix(resume.LOCK) == name
            or name.removesuffix(resume.LOCK) not in found]


def reads_of(monkeypatch):
    """Which threads read weights from now on, and how many bytes."""
    from gqa_export.weights.source_kinds import StoredSource

    read, chunks = [], StoredSource.chunks

    def noted(self, *into):
        read.append((threading.current_thread().name, self.tensor.nbytes))
        return chunks(self, *into)

    monkeypatch.setattr(StoredSource, "chunks", noted)
    return read


def test_a_killed_export_is_taken_up_where_it_was_and_gives_the_same_bundle(killed, whole, monkeypatch):
    folder, out = killed
    assert not out.exists()
    assert len(partials(out)) == 1
    undisturbed, data = whole
    read = reads_of(monkeypatch)
    done = export_onnx(folder, out, ExportOptions(dtype="fp16"))
    # fp32 is read for fp16: twice the bytes, of the last part only
    assert 0 < sum(count for _, count in read) < undisturbed.manifest.bytes_copied
    assert {thread for thread, _ in read} == {"MainThread"}, "once the graph is there, see the test below"
    assert "weights-ahead" not in {thread.name for thread in threading.enumerate()}
    assert (out / DATA).read_bytes() == data
    assert done.manifest.files[DATA] == undisturbed.manifest.files[DATA]
    assert partials(out) == []
    assert not list(out.glob("*journal*")) + list(out.parent.glob("*.lock"))


@pytest.mark.parametrize("how", ["refused", "interrupted"])
def test_what_a_killed_export_left_outlives_one_that_ends_before_its_graph_is_there(killed, whole, monkeypatch, how):
    """It may be hours of work, and what ended the other may be a word of its command."""
    folder, out = killed
    kept, real = partials(out), to_onnx.prepare

    def interrupted(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    if how == "refused":
        with refused("E-ENV-MEMORY"):
            export_onnx(folder, out, ExportOptions(dtype="fp16", max_ram=1))
    else:
        monkeypatch.setattr(to_onnx, "prepare", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_onnx(folder, out, ExportOptions(dtype="fp16"))
        monkeypatch.setattr(to_onnx, "prepare", real)
    # and one of another type, whose weights are written ahead
    with refused("E-ENV-MEMORY"):
        export_onnx(folder, out, ExportOptions(dtype="bf16", max_ram=1))
    assert partials(out) == kept
    read = reads_of(monkeypatch)
    export_onnx(folder, out, ExportOptions(dtype="fp16"))
    assert 0 < sum(count for _, count in read) < whole[0].manifest.bytes_copied, "taken up all the same"
    assert (out / DATA).read_bytes() == whole[1]
    assert partials(out) == []


def test_a_checkpoint_that_changed_meanwhile_is_exported_from_the_start(tmp_path, killed):
    folder, out = killed
    file = folder / "model.safetensors"
    tensors = {name: tensor * 2 for name, tensor in load_file(file).items()}
    time.sleep(0.01)
    save_file(tensors, file, metadata={"format": "pt"})
    export_onnx(folder, out, ExportOptions(dtype="fp16"))
    export_onnx(folder, tmp_path / "whole", ExportOptions(dtype="fp16"))
    assert (out / DATA).read_bytes() == (tmp_path / "whole" / DATA).read_bytes()
    assert partials(out) == []


def test_a_beginning_that_was_damaged_is_not_taken_over(killed, whole):
    folder, out = killed
    (partial,) = [out.parent / name for name in partials(out)]
    data = bytearray((partial / DATA).read_bytes())
    data[10] ^= 1
    (partial / DATA).write_bytes(data)
    export_onnx(folder, out, ExportOptions(dtype="fp16"))
    assert (out / DATA).read_bytes() == whole[1]


def test_the_folder_of_a_living_export_is_left_alone(tmp_path):
    out = tmp_path / "out"
    with writing_bundle(out) as writer:
        assert resume.abandoned(out) == []
        with writing_bundle(out):
            pass
        assert writer.staging.is_dir()
        os.rmdir(out)


def test_a_lock_that_cannot_be_opened_is_somebody_elses_and_stops_nothing(tmp_path):
    out = tmp_path / "out"
    theirs = tmp_path / f".{out.name}.partial-theirs{resume.LOCK}"
    theirs.mkdir()  # cannot be opened for writing, whoever runs the tests
    with writing_bundle(out) as writer:
        writer.write("file", b"ours")
    assert (out / "file").read_bytes() == b"ours"
    assert theirs.is_dir()


HELD = """
import sys, time
from pathlib import Path
from gqa_export.files.staging import staging_folder
output = Path(sys.argv[1])
with staging_folder(output, output.parent) as (staging, _):
    (staging / "file").write_text("half")
    print(staging.name, flush=True)
    time.sleep(60)
"""


def test_a_folder_is_claimed_while_its_process_lives_and_abandoned_once_it_is_killed(tmp_path):
    out = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", HELD, str(out)], stdout=subprocess.PIPE, text=True)
    name = child.stdout.readline().strip()
    assert (tmp_path / name / "file").is_file()
    assert resume.abandoned(out) == []
    child.send_signal(signal.SIGKILL)
    child.wait()
    claimed = resume.abandoned(out)
    assert [folder.name for folder, _ in claimed] == [name]
    assert resume.abandoned(out) == [], "claimed for this process now"
    resume.remove(claimed)
    assert list(tmp_path.iterdir()) == []


def test_a_symbolic_link_is_not_taken_for_a_lock(tmp_path):
    (tmp_path / "precious").write_text("content")
    (tmp_path / f".out.partial-x{resume.LOCK}").symlink_to(tmp_path / "precious")
    assert resume.abandoned(tmp_path / "out") == []
    assert (tmp_path / "precious").read_text() == "content"
