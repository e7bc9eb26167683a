"""Ranks of one engine bundle: the order of what they do together, and that none waits for one that failed."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from refusal import refused

from gqa_export.bundle import engine_facts
from gqa_export.bundle.manifest import Manifest
from gqa_export.errors import GqaExportError
from gqa_export.runtime.generate import Sampling, generate
from gqa_export.runtime.open_session import with_shared_seed
from gqa_export.runtime.tensorrt import ranks as module
from gqa_export.runtime.tensorrt.ranks import Ranks, RankSession, launched_rank
from gqa_export.spec import AttentionSpec, ModelSpec

SIZE, VOCABULARY, CAPACITY = 3, 11, 16
ENDS_S = 20.0


class Room:
    """What the ranks of a test share: notes, and a barrier in place of NCCL."""

    def __init__(self) -> None:
        self.notes: dict[tuple[str, int], str] = {}
        self.log: list[tuple[int, str]] = []
        self.barrier = threading.Barrier(SIZE)
        self.steps = threading.Barrier(SIZE)

    def meeting(self, rank: int):
        def communicator():
            self.log.append((rank, "communicator"))
            return f"comm {rank}"

        return SimpleNamespace(rank=rank, size=SIZE, communicator=communicator,
                               share=lambda topic, text: self.notes.__setitem__((topic, rank), text),
                               look=lambda topic, other: self.notes.get((topic, other)))


class Backend:
    """An engine whose run ends when all ranks run; it `breaks` on a step, or does not take the communicator."""

    def __init__(self, room: Room, rank: int, breaks: int = -1, joins: bool = True) -> None:
        self.room, self.rank, self.breaks, self.joins, self.count = room, rank, breaks, joins, 0
        self.thread: threading.Thread | None = None

    def join(self, communicator) -> None:
        if not self.joins:
            raise GqaExportError("no", code="E-RUN-COMMUNICATOR")
        assert communicator == f"comm {self.rank}"
        self.room.barrier.wait(ENDS_S)
        self.room.log.append((self.rank, "joined"))

    def allocate(self, batch: int) -> None:
        self.batch = batch

    def run(self, ids, past, new, row):
        if self.count == self.breaks:
            raise GqaExportError("this rank breaks", code="E-ENGINE-RUN")
        self.count += 1
        self.thread = threading.Thread(target=self._meet, daemon=True)
        self.thread.start()
        return (ids[:, -1:] + past[:, None] + new[:, None]) % VOCABULARY

    def _meet(self) -> None:
        try:
            self.room.steps.wait(ENDS_S)
        except threading.BrokenBarrierError:
            return

    def done(self) -> bool:
        return not self.thread.is_alive()

    def host(self, logits):
        return np.eye(VOCABULARY, dtype=np.float32)[logits]

    def cache(self) -> list:
        return []

    def copy_row(self, source, destination, length) -> None:
        self.copied = (source, destination, length)

    def clear_row(self, row, length) -> None:
        self.cleared = (row, length)

    def fill_tail(self, lengths, values) -> None:
        raise AssertionError


@pytest.fixture
def manifest():
    spec = ModelSpec("llama", "Llama", VOCABULARY, 8, 64, "default", (AttentionSpec(0, 2, 1, 8, 8, 1.0),))
    shapes = {"input_ids": ((1, 1), (1, 1), (2, 8)), "past_lengths": ((1,), (1,), (2,)),
              "new_lengths": ((1,), (1,), (2,))}
    profiles = tuple(engine_facts.ProfileFacts(name, shapes) for name in ("decode", "prefill"))
    facts = engine_facts.EngineFacts("rtx", "1.7", (), "native", profiles, {
        f"present.0.{kind}": f"past_key_values.0.{kind}" for kind in ("key", "value")})
    return Manifest("trt-native", "float32", "static", CAPACITY, "last", "copy", spec, (), (), engine=facts)


def together(function, timeout: float = ENDS_S) -> list:
    """What `function(rank)` gives or raises on each rank, run at once; none may still run after the timeout."""
    found: list = [None] * SIZE

    def run(rank: int) -> None:
        try:
            found[rank] = function(rank)
        except GqaExportError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(SIZE)]
    for thread in threads:
        thread.start()
    ends = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, ends - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return found


def session(room, manifest, rank, order="same", timeout_s=ENDS_S, **options):
    return RankSession(manifest, Backend(room, rank, **options), Ranks(room.meeting(rank), timeout_s), order)


def test_every_rank_joins_before_any_runs_and_all_generate_the_same(manifest):
    room = Room()

    def run(rank):
        opened = session(room, manifest, rank)
        room.log.append((rank, "opened"))
        return generate(opened, [[1, 2, 3]], 6, ()).tokens[0]

    found = together(run)
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 6
    steps = [what for _, what in room.log]
    assert [steps.index(what) for what in ("communicator", "joined", "opened")] == [0, SIZE, 2 * SIZE]
    assert steps == ["communicator"] * SIZE + ["joined"] * SIZE + ["opened"] * SIZE


@pytest.mark.parametrize("breaks", [0, 1, 3])
def test_a_rank_that_fails_in_a_step_ends_the_others_with_its_reason(manifest, breaks):
    room = Room()

    def run(rank):
        opened = session(room, manifest, rank, breaks=breaks if rank == 1 else -1)
        return generate(opened, [[1, 2, 3]], 6, ())

    began = time.monotonic()
    found = together(run)
    assert [error.code for error in found] == ["E-RUN-RANK-FAILED", "E-ENGINE-RUN", "E-RUN-RANK-FAILED"]
    assert "rank 1 failed" in found[0].what
    assert "this rank breaks" in found[2].what
    assert time.monotonic() - began < ENDS_S / 2


def test_a_rank_whose_communicator_is_refused_ends_the_others(manifest):
    room = Room()
    found = together(lambda rank: session(room, manifest, rank, joins=rank != 2))
    assert [error.code for error in found] == ["E-RUN-RANK-FAILED", "E-RUN-RANK-FAILED", "E-RUN-COMMUNICATOR"]


def test_ranks_of_different_bundles_do_not_begin(manifest):
    room = Room()
    found = together(lambda rank: session(room, manifest, rank, order="other" if rank == 1 else "same"))
    assert {error.code for error in found} <= {"E-RUN-RANK-ORDER", "E-RUN-RANK-FAILED"}
    assert not room.log


def test_a_rank_that_never_comes_is_waited_for_until_the_timeout(manifest):
    room = Room()

    def run(rank):
        return "away" if rank == 1 else session(room, manifest, rank, timeout_s=0.2)

    found = together(run)
    assert found[1] == "away"
    assert {found[0].code, found[2].code} <= {"E-RUN-RANK-TIMEOUT", "E-RUN-RANK-FAILED"}
    assert "E-RUN-RANK-TIMEOUT" in {found[0].code, found[2].code}


def test_without_a_seed_all_ranks_draw_with_that_of_the_first(manifest):
    room = Room()

    def run(rank):
        opened = session(room, manifest, rank)
        seeds = [with_shared_seed(opened, Sampling(temperature=0.7)).seed for _ in range(2)]
        return [*seeds, with_shared_seed(opened, Sampling(temperature=0.7, seed=5)).seed,
                with_shared_seed(opened, Sampling()).seed]

    found = together(run)
    assert found[0] == found[1] == found[2]
    assert found[0][0] != found[0][1]
    assert found[0][2:] == [5, None]


def test_the_number_of_processes_is_that_of_the_ranks(monkeypatch, tmp_path, manifest):
    monkeypatch.setattr(module, "read_manifest", lambda folder: SimpleNamespace(parallel=SimpleNamespace(ranks=[1, 2])))
    monkeypatch.setattr(module, "check_bundle", lambda folder: SimpleNamespace(manifest=manifest, facts=None))
    for size in ("1", "4"):
        monkeypatch.setenv("WORLD_SIZE", size)
        with refused("E-RUN-RANKS", GqaExportError) as found:
            module.open_ranks(tmp_path)
        assert "torchrun --nproc-per-node 2" in found.error.fix
    monkeypatch.setenv("RANK", "3")
    assert launched_rank() == 3
