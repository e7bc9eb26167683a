"""Ranks in C++: processes over the toy engine, and a stand-in for NCCL. All answer alike; when one fails, none hangs.

The toy's ranks add up their summands before they answer, so that a rank which is not there, or reads another's tokens,
changes what all of them say. Streams of the stand-in for CUDA run by themselves here, as a GPU's do.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import Programs
from .toy_bundle import answer, continued, rank_manifest, write_bundle, write_rank_bundle

RANKS = 3
ENDS_S = 60.0
SHORT = 1.5
"""seconds that a rank waits for one that does not come"""


class Played:
    """What each rank said, how it ended, and what its stand-ins logged."""

    def __init__(self, programs: Programs, folder: Path, *lines: str, breaks: dict[int, str] | None = None,
                 timeout_s: float = ENDS_S, away: tuple[int, ...] = (),
                 lines_of: dict[int, tuple[str, ...]] | None = None, orders: tuple[str, ...] = (),
                 program: tuple[str | Path, ...] = ("rank_on_toy",), **environment: str | Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_text(rank_manifest(RANKS, orders=orders).to_json())
        began, processes = time.monotonic(), []
        for rank in range(RANKS):
            name, *rest = program
            words = [*rest] or [folder / "manifest.json"]
            if rank in away:
                continue
            own = {**os.environ, "LD_LIBRARY_PATH": f"{programs.libraries}:{programs.libraries / 'nccl'}",
                   "GQA_STUB_ASYNC": "1", "GQA_STUB_GPUS": str(RANKS), "GQA_STUB_NCCL_FOLDER": str(folder / "nccl"),
                   "GQA_STUB_LOG": str(folder / f"log{rank}"), "GQA_STUB_TENSORRT_VERSION": "11.1.0",
                   **({"GQA_TOY_BREAK": breaks[rank]} if rank in (breaks or {}) else {}),
                   **{key: str(value) for key, value in environment.items()}}
            command = [programs.folder / "bin" / name, *words, rank, RANKS, folder / "meeting", timeout_s]
            processes.append((rank, subprocess.Popen(list(map(str, command)), text=True, env=own,
                                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE)))
        script = lines_of or {}
        for rank, process in processes:
            with contextlib.suppress(BrokenPipeError):  # it ended already
                process.stdin.write("\n".join(script.get(rank, lines)) + "\n")
                process.stdin.close()
        self.said: dict[int, list[str]] = {}
        self.ended: dict[int, int] = {}
        try:
            for rank, process in processes:
                self.ended[rank] = process.wait(max(0.1, ENDS_S - (time.monotonic() - began)))
                self.said[rank] = process.stdout.read().splitlines()
        finally:
            for _, process in processes:
                process.kill()
                process.wait()
        self.took_s = time.monotonic() - began
        self.log = {rank: [line for line in (folder / f"log{rank}").read_text().splitlines()
                           if line.startswith(("nccl", "joined", "run", "capture", "graph"))] for rank, _ in processes}


def test_ranks_answer_alike_and_as_the_whole(programs: Programs, tmp_path: Path) -> None:
    """Ragged prompts, a prompt of several parts, a row that rests, generation to an end token."""
    played = Played(programs, tmp_path, "prefill 3,1,4,1,5,9,2;1,5", "step 9,-1", "step 6,5", "generate 6 - 3,1,4;5",
                    "lengths")
    rows = [continued(prompt, 6, ranks=RANKS) for prompt in ([3, 1, 4], [5])]
    assert played.said[0] == [
        f"{answer([3, 1, 4, 1, 5, 9, 2], RANKS)} {answer([1, 5], RANKS)}",
        f"{answer([3, 1, 4, 1, 5, 9, 2, 9], RANKS)} 0",
        f"{answer([3, 1, 4, 1, 5, 9, 2, 9, 6], RANKS)} {answer([1, 5, 5], RANKS)}",
        ";".join(",".join(map(str, row)) for row in rows),
        " ".join(str(len(prompt) + len(row) - 1) for prompt, row in zip(([3, 1, 4], [5]), rows, strict=True))]
    assert played.said[1] == played.said[2] == played.said[0]
    assert set(played.ended.values()) == {0}


def test_every_rank_joins_with_all_its_contexts_before_any_runs(programs: Programs, tmp_path: Path) -> None:
    played = Played(programs, tmp_path, "prefill 3,1,4", "step 1", "step 5", "step 9")
    for rank, log in played.log.items():
        assert log == [f"nccl init {rank} of {RANKS}", "joined profile 0", "joined profile 1", "run profile 1",
                       *["run profile 0"] * 3, "nccl destroy"], "and no step is captured"
    assert not (tmp_path / "meeting").exists(), "rank 0 removes the file"


def test_a_session_ends_though_destroying_its_communicator_never_does(programs: Programs, tmp_path: Path) -> None:
    """NCCL destroys together: a rank that is gone would be waited for without an end."""
    played = Played(programs, tmp_path, "prefill 3,1,4", timeout_s=SHORT, GQA_STUB_NCCL_STUCK="1")
    assert set(played.ended.values()) == {0}
    assert played.said[0] == [str(answer([3, 1, 4], RANKS))]


def test_ranks_draw_with_the_seed_of_the_first(programs: Programs, tmp_path: Path) -> None:
    lines = {rank: (f"seed {rank + 5}", f"sample 8 {rank + 11} 5.0 1,2,3") for rank in range(RANKS)}
    played = Played(programs, tmp_path, lines_of=lines)
    assert played.said[0][0] == "5"
    assert played.said[1] == played.said[2] == played.said[0]
    greedy = continued([1, 2, 3], 8, ranks=RANKS)
    assert played.said[0][1] != ",".join(map(str, greedy)), "at this temperature the most likely token is no rule"


@pytest.mark.parametrize("run", [0, 2])
def test_a_rank_that_fails_ends_the_others(programs: Programs, tmp_path: Path, run: int) -> None:
    """Where NCCL tells the others, they end at once, a slow one perhaps in what came before; none goes on after it."""
    played = Played(programs, tmp_path, "prefill 3", "step 1", "step 4", "step 1", breaks={1: f"enqueue:{run}"})
    for rank in range(RANKS):
        good = [line for line in played.said[rank] if not line.startswith("error")]
        assert good == [str(answer([3, 1, 4][:length], RANKS)) for length in range(1, len(good) + 1)]
        assert max(run - 1, 0) <= len(good) <= run
        left = "error|this rank has left the others after a failure|rank "
        assert played.ended[rank] == 2 or played.said[rank][-1].startswith(left)
    assert played.said[1][run].startswith("error|this rank breaks|")
    for rank in (0, 2):
        cause, where, fix = next(line for line in played.said[rank] if line.startswith("error")).split("|")[1:]
        assert cause.startswith("another rank failed: remote process exited")
        assert where.startswith(f"rank {rank}, ")
        assert fix.endswith("start all ranks again")
    assert played.took_s < ENDS_S / 2
    assert all(log.count("nccl abort") == 1 and "nccl destroy" not in log for log in played.log.values())


@pytest.mark.parametrize("how", ["enqueue:1", "die:1", "late:1"])
def test_a_rank_of_which_nccl_tells_nothing_is_waited_for_until_the_timeout(programs: Programs, tmp_path: Path,
                                                                            how: str) -> None:
    """It refuses its run, its process ends, or it comes when the others have left."""
    played = Played(programs, tmp_path, "prefill 3", "step 1", breaks={1: how}, timeout_s=SHORT,
                    GQA_STUB_NCCL_SILENT="1")
    for rank in (0, 2):
        assert played.said[rank][0] == str(answer([3], RANKS))
        assert played.said[rank][1].startswith(f"error|the other ranks were not there within {SHORT:g} s|rank {rank}, ")
    assert played.ended[1] == (9 if how == "die:1" else 0)
    assert played.took_s < ENDS_S / 2


def test_a_rank_that_refuses_the_communicator_ends_the_others(programs: Programs, tmp_path: Path) -> None:
    played = Played(programs, tmp_path, "prefill 3", breaks={2: "join"})
    assert played.said[2][0].startswith("error|the toy refuses the communicator|")
    assert set(played.ended.values()) <= {0, 2}
    for rank in (0, 1):
        assert played.said[rank][0].startswith("error|another rank failed: ")


def test_ranks_of_different_bundles_do_not_begin(programs: Programs, tmp_path: Path) -> None:
    """The first to notice says so; a slower one may only learn that the others have left."""
    played = Played(programs, tmp_path, "prefill 3", orders=("one", "one", "two"))
    odd = "error|the collectives of rank 2 are not those of rank 0: they would wait for one another for ever|"
    assert any(said[0].startswith(odd) for said in played.said.values())
    for rank in range(RANKS):
        assert played.ended[rank] == 2
        assert played.said[rank][0].startswith((odd, "error|another rank failed: "))
        assert not [line for line in played.log[rank] if line.startswith(("joined", "run"))]


@pytest.mark.parametrize("away", [0, 1])
def test_a_rank_that_never_comes_is_waited_for_until_the_timeout(programs: Programs, tmp_path: Path, away: int) -> None:
    played = Played(programs, tmp_path, "prefill 3", away=(away,), timeout_s=SHORT)
    what = "rank 0 did not write the file" if away == 0 else f"the other ranks were not there within {SHORT:g} s"
    assert all(said[0].startswith(f"error|{what}") for said in played.said.values())
    assert set(played.ended.values()) == {2}


def test_a_file_of_ranks_that_were_started_before_is_not_used(programs: Programs, tmp_path: Path) -> None:
    (tmp_path / "meeting").write_bytes(b"")
    played = Played(programs, tmp_path, "prefill 3", away=(1, 2), timeout_s=SHORT)
    assert played.said[0][0].startswith("error|the file for the ranks' meeting is there already|")
    assert (tmp_path / "meeting").exists()


def test_nccl_that_is_not_installed_is_said_with_the_fix(programs: Programs, tmp_path: Path) -> None:
    played = Played(programs, tmp_path, away=(1, 2), LD_LIBRARY_PATH=programs.libraries)
    kind, what, _, fix = played.said[0][0].split("|")
    assert (kind, what.partition(":")[0]) == ("error", "cannot load libnccl.so.2")
    assert fix.startswith("install NCCL")


def read(programs: Programs, folder: Path, *words: object) -> str:
    return programs.run("probe_runtime", "rank", folder, *map(str, words)).strip()


def test_a_rank_reads_its_own_engine_and_heads(programs: Programs, tmp_path: Path) -> None:
    folder = write_rank_bundle(tmp_path / "bundle", RANKS, held=2)
    sha256 = json.loads((folder / "gqa_export.json").read_text())["parallel"]["ranks"][1]["collectives_sha256"]
    caches = " ".join(f"{side}.{layer}.{part}:2" for side in ("past_key_values", "present") for layer in range(2)
                      for part in ("key", "value"))
    assert read(programs, folder, 1, RANKS, 0) == f"1 of {RANKS} rank1/model.engine {sha256[:4]} {caches}"


@pytest.mark.parametrize(("words", "what"), [
    ((0, 0, 0), "the bundle is cut over 3 ranks, and no communicator was given"),
    ((0, 2, 0), "the bundle is cut over 3 ranks, and the communicator has 2"),
    ((3, 3, 0), "the bundle has no rank 3"),
    ((0, 3, 1), "the communicator is of GPU 1, and the session is to run on GPU 0")])
def test_ranks_that_do_not_fit_are_refused_with_the_fix(programs: Programs, tmp_path: Path, words, what: str) -> None:
    kind, cause, where, fix = read(programs, write_rank_bundle(tmp_path / "bundle", RANKS), *words).split("|")
    assert (kind, cause) == ("error", what)
    assert where
    assert fix


def test_a_communicator_for_a_bundle_of_one_device_is_refused(programs: Programs, tmp_path: Path) -> None:
    assert read(programs, write_bundle(tmp_path / "bundle"), 0, 2, 0).startswith(
        "error|a communicator was given, and the bundle is for one device|")


@pytest.mark.parametrize(("change", "what"), [
    (lambda data: data["parallel"]["ranks"][0].update(folder="../rank0"), "the rank's folder lies outside the bundle"),
    (lambda data: data["parallel"]["ranks"][0]["heads"].pop(), "the rank holds no heads of past_key_values.1.key"),
    (lambda data: data["files"].clear(), 'expected a key "rank0/model.engine"')])
def test_a_manifest_of_ranks_that_is_not_whole_is_refused(programs: Programs, tmp_path: Path, change,
                                                          what: str) -> None:
    folder = write_rank_bundle(tmp_path / "bundle", RANKS)
    data = json.loads((folder / "gqa_export.json").read_text())
    change(data)
    (folder / "gqa_export.json").write_text(json.dumps(data))
    assert read(programs, folder, 0, RANKS, 0).split("|")[:2] == ["error", what]


@pytest.fixture(scope="module")
def tensorrt(tensorrt_programs: Programs) -> Programs:
    if not (tensorrt_programs.libraries / "libnvinfer.so.11").exists():
        pytest.skip("the stand-in for TensorRT is for the headers of TensorRT 11")
    return tensorrt_programs


def loaded(tensorrt: Programs, folder: Path, *lines: str, program: str = "rank_on_bundle", **options) -> Played:
    bundle = write_rank_bundle(folder / "bundle", RANKS)
    return Played(tensorrt, folder, *lines, program=(program, bundle), **options)


def test_a_bundle_of_ranks_is_opened_and_run_through_tensorrts_own_classes(tensorrt: Programs, tmp_path: Path) -> None:
    played = loaded(tensorrt, tmp_path, "prefill 3,1,4;1,5", "step 9,2", "step 6,5")
    assert played.said[0] == [f"{answer([3, 1, 4], RANKS)} {answer([1, 5], RANKS)}",
                              f"{answer([3, 1, 4, 9], RANKS)} {answer([1, 5, 2], RANKS)}",
                              f"{answer([3, 1, 4, 9, 6], RANKS)} {answer([1, 5, 2, 5], RANKS)}"]
    assert played.said[1] == played.said[2] == played.said[0]
    assert played.log[1][:3] == [f"nccl init 1 of {RANKS}", "joined profile 0", "joined profile 1"]


def test_the_c_interface_takes_an_nccl_communicator(tensorrt: Programs, tmp_path: Path) -> None:
    """All ranks draw the same tokens: the logits are gathered, the seed is rank 0's."""
    played = loaded(tensorrt, tmp_path, program="rank_by_c",
                    lines_of={rank: (f"3 {rank + 7}",) for rank in range(RANKS)})
    (line,) = played.said[0]
    assert played.said[1] == played.said[2] == played.said[0]
    read = [3]
    for pair in line.split():
        best, drawn = map(int, pair.split(","))
        assert best == answer(read, RANKS)
        read.append(drawn)
    assert len(set(read)) > 2
    assert all(log[-1] == "nccl destroy" for log in played.log.values()), "the session took it over"


@pytest.mark.parametrize("program", ["rank_on_bundle", "rank_by_c"])
@pytest.mark.parametrize("how", ["join", "enqueue:1"])
def test_a_rank_that_fails_in_tensorrt_ends_the_others(tensorrt: Programs, tmp_path: Path, program: str,
                                                       how: str) -> None:
    lines = ("prefill 3", "step 1", "step 2") if program == "rank_on_bundle" else ("3 1",)
    played = loaded(tensorrt, tmp_path, *lines, program=program, breaks={1: how})
    own = {"join": "setting the communicator failed: the communicator was told to be refused",
           "enqueue:1": "running the engine failed: enqueue was told to fail"}[how]
    assert any(own in line for line in played.said[1])
    for rank in (0, 2):
        assert any("another rank failed: " in line for line in played.said[rank])
    assert played.took_s < ENDS_S / 2


def test_a_rank_whose_engine_is_damaged_is_named_to_the_others(tensorrt: Programs, tmp_path: Path) -> None:
    bundle = write_rank_bundle(tmp_path / "bundle", RANKS)
    (bundle / "rank2" / "model.engine").write_bytes(b"")
    played = Played(tensorrt, tmp_path, "prefill 3", program=("rank_on_bundle", bundle))
    assert played.said[2][0].startswith("error|the engine's file is not the one that the manifest describes")
    named = "error|rank 2 could not open its engine|"
    assert any(played.said[rank][0].startswith(named) for rank in (0, 1))
    assert all(played.said[rank][0].startswith((named, "error|another rank failed: ")) for rank in (0, 1))
    assert set(played.ended.values()) == {2}


def test_the_program_runs_a_bundle_of_ranks(tensorrt: Programs, tmp_path: Path) -> None:
    bundle = write_rank_bundle(tmp_path / "bundle", RANKS)
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{tensorrt.libraries}:{tensorrt.libraries / 'nccl'}",
                   "GQA_STUB_ASYNC": "1", "GQA_STUB_GPUS": str(RANKS), "GQA_STUB_TENSORRT_VERSION": "11.1.0",
                   "GQA_STUB_NCCL_FOLDER": str(tmp_path / "nccl")}
    words = ["--tokens", "3 1 4", "--max-new-tokens", "5", "--ranks", str(RANKS), "--meeting", tmp_path / "meeting"]
    processes = [subprocess.Popen([tensorrt.folder / "bin" / "gqa_generate", bundle, *words, "--rank", str(rank)],
                                  env=environment, text=True, stdout=subprocess.PIPE) for rank in range(RANKS)]
    said = [process.communicate(timeout=ENDS_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * RANKS
    assert said[0].split() == [str(token) for token in continued([3, 1, 4], 5, ranks=RANKS)]
    assert said[1:] == [""] * (RANKS - 1), "rank 0 prints"
