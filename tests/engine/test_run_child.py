"""The building process: whatever becomes of it is a result or one clear error, and it never outlives its parent."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from refusal import refused

from gqa_export.engine.build_job import Built, Job, KernelFiles, Tensor
from gqa_export.engine.run_child import MODULE, run_job
from gqa_export.environment.tensorrt_libraries import Library

LIBRARY = Library("rtx", "tensorrt_rtx", "1.7", ())
JOB = Job("rtx", "tensorrt_rtx_bindings", "tensorrt_rtx", "model.onnx", "model.engine", (80, 89),
          (("decode", {"input_ids": ((1, 1), (1, 1), (2, 1))}),), KernelFiles({"append": {"80": "a" * 64}}, "kernels"),
          workspace_bytes=5)
BUILT = {"version": "1.7", "inputs": [{"name": "input_ids", "type": "INT32", "shape": [-1, -1]}], "outputs": [],
         "aliases": {"present.0.key": "past_key_values.0.key"}, "plugin_layers": 1, "attention_layers": 0,
         "containers": 1, "seconds": 2.5}


@pytest.fixture
def child(tmp_path, monkeypatch):
    """(source of a child) -> what run_job makes of it, and the progress it reported."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(source: str):
        (tmp_path / "made_up_child.py").write_text("import json, os, signal, sys\n" + textwrap.dedent(source))
        seen: list[tuple] = []
        built = run_job(JOB, LIBRARY, tmp_path / "build.log", lambda *what: seen.append(what), "made_up_child")
        return built, seen

    return run


def test_a_job_survives_its_way_as_text() -> None:
    there = Job.from_json(JOB.to_json())
    assert there.kernels == JOB.kernels
    assert there.capabilities == (80, 89)
    assert json.loads(there.to_json()) == json.loads(JOB.to_json())
    assert Job.from_json(Job("rtx", "m", "c", "o", "e", (), ()).to_json()).kernels is None


def test_progress_is_passed_on_and_the_result_read(child) -> None:
    built, seen = child(f"""
        job = json.loads(sys.stdin.read())
        print(json.dumps({{"progress": ["Building", 1, 4]}}))
        print(json.dumps({{"built": {BUILT!r}}}))
        print("chatter", file=sys.stderr)
    """)
    assert seen == [("Building", 1, 4)]
    assert isinstance(built, Built)
    assert built.inputs == (Tensor("input_ids", "INT32", (-1, -1)),)
    assert built.aliases == BUILT["aliases"]


def test_a_refusal_keeps_its_parts(child) -> None:
    with refused("E-ENGINE-X") as refusal:
        child("""
            print(json.dumps({"refused": ["no such kernel", "layer 3", "compile it", "E-ENGINE-X"]}))
            sys.exit(2)
        """)
    assert (refusal.error.what, refusal.error.where, refusal.error.fix) == ("no such kernel", "layer 3", "compile it")


def test_a_refusal_by_tensorrt_brings_its_own_words(child) -> None:
    with refused("E-ENGINE-BUILD") as refusal:
        child("""
            print("[V] fine", "[E] no implementation for node", sep="\\n", file=sys.stderr)
            print(json.dumps({"refused": ["could not build", "model.onnx", "", "E-ENGINE-BUILD"]}))
            sys.exit(2)
        """)
    assert "[E] no implementation for node" in refusal.error.what
    assert refusal.error.fix


def test_an_abort_inside_is_an_error_with_the_last_lines(child) -> None:
    with refused("E-ENGINE-CRASH") as refusal:
        child("""
            print("terminate called without an active exception", file=sys.stderr, flush=True)
            os.abort()
        """)
    assert all(words in refusal.error.what for words in ("SIGABRT", "terminate called"))
    assert "gqa-export doctor" in refusal.error.fix


def test_an_end_without_a_word_is_an_error(child) -> None:
    with refused("E-ENGINE-CRASH"):
        child("pass")
    with refused("E-ENGINE-CRASH") as refusal:
        child("sys.exit(7)")
    assert "code 7" in refusal.error.what


def test_a_kill_from_outside_has_a_code_of_its_own(child) -> None:
    with refused("E-ENGINE-KILLED"):
        child("os.kill(os.getpid(), signal.SIGKILL)")


def test_a_build_whose_parent_ended_ends_itself() -> None:
    child = subprocess.Popen([sys.executable, "-m", MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    child.stdout.close()  # the parent is gone
    child.stdin.write(Job("rtx", "no_such_module", "no_such_module", "m", "e", (), ()).to_json())
    child.stdin.close()
    assert child.wait(timeout=60) == 1
    assert "BrokenPipeError" not in child.stderr.read()


def test_an_interrupted_build_leaves_no_process(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "made_up_child.py").write_text(textwrap.dedent("""
        import json, os, time
        print(json.dumps({"progress": [str(os.getpid()), None, None]}), flush=True)
        time.sleep(300)
    """))
    pids: list[int] = []

    def interrupt(text: str, *_: object) -> None:
        pids.append(int(text))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(JOB, LIBRARY, tmp_path / "build.log", interrupt, "made_up_child")
    assert not Path(f"/proc/{pids[0]}").exists()
