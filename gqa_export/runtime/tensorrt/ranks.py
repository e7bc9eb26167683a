"""An engine bundle that is cut over ranks, one process a rank: `torchrun --nproc-per-node N -m gqa_export run BUNDLE`.

Each rank opens its own engine and cache, the ranks check that they will meet in the same order, and take a communicator
of NCCL from torch.distributed; TensorRT is given it on all ranks at once, because one after the other waits for ever.
Every rank gets the same gathered logits and so goes on with the same tokens. A rank that fails says so in the store of
the rendezvous: the others end with an error instead of waiting for it. Not yet run on GPUs: the tests hold the order of
calls and the failures to stand-ins.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...bundle.manifest import Manifest, read_manifest
from ...bundle.rank_view import rank_manifest
from ...errors import GqaExportError, cause_of
from ..session import Step
from .check import check_bundle, check_device, import_flavor
from .session import EngineBackend, EngineSession

TIMEOUT_S = 120.0
PAUSE_S = 20e-6


class Meeting(Protocol):
    """How ranks find one another."""

    rank: int
    size: int

    def share(self, topic: str, text: str) -> None:
        """Put something where the other ranks can read it."""

    def look(self, topic: str, rank: int) -> str | None:
        """What a rank shared under a topic; None as long as it did not."""

    def communicator(self) -> Any:
        """The capsule of this rank's ncclComm_t. All ranks call it."""


class RankBackend(EngineBackend, Protocol):
    """A backend of one rank."""

    def join(self, communicator: Any) -> None:
        """Give every context the communicator."""

    def done(self) -> bool:
        """Whether the last run has ended."""


def launched_rank() -> int:
    """The number of this process among those of torchrun; 0 without it."""
    return int(os.environ.get("RANK", "0"))


class Ranks:
    """One rank among others: waits for them, but not for ever, and not for one that failed."""

    def __init__(self, meeting: Meeting, timeout_s: float = TIMEOUT_S) -> None:
        self.meeting, self.timeout_s = meeting, timeout_s
        self.rank, self.size = meeting.rank, meeting.size
        self._rounds: dict[str, int] = {}

    def gather(self, topic: str, text: str) -> list[str]:
        """What every rank shares under a topic, in order.

        Raises:
            GqaExportError: a rank failed, or was not there in time.
        """
        self._rounds[topic] = self._rounds.get(topic, 0) + 1
        topic = f"{topic}/{self._rounds[topic]}"
        self.meeting.share(topic, text)
        found: list[str | None] = [None] * self.size

        def complete() -> bool:
            for rank in range(self.size):
                found[rank] = found[rank] if found[rank] is not None else self.meeting.look(topic, rank)
            return None not in found

        self.wait(complete, topic)
        return [text for text in found if text is not None]

    def wait(self, done: Callable[[], bool], doing: str) -> None:
        """Return when `done` is true; raises as `gather`."""
        began, pause = time.monotonic(), PAUSE_S
        while not done():
            for rank in range(self.size):
                failure = self.meeting.look("failed", rank) if rank != self.rank else None
                if failure is not None:
                    raise GqaExportError(f"rank {rank} failed: {failure}", f"rank {self.rank}, {doing}",
                                         "see that rank's own message; start all ranks again", code="E-RUN-RANK-FAILED")
            if time.monotonic() - began > self.timeout_s:
                raise GqaExportError(f"the other ranks were not there within {self.timeout_s:g} s",
                                     f"rank {self.rank}, {doing}", "start all ranks again, with torchrun",
                                     code="E-RUN-RANK-TIMEOUT")
            time.sleep(pause)
            pause = min(2 * pause, 0.01)

    def call(self, function: Callable[[], None], doing: str) -> None:
        """Make a call that returns only when every rank makes it. Raises as `gather`, and what it raises."""
        failures: list[BaseException] = []

        def run() -> None:
            try:
                function()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run, daemon=True, name=f"gqa-export-{doing}")
        thread.start()
        self.wait(lambda: not thread.is_alive(), doing)
        if failures:
            raise failures[0]

    def fail(self, reason: BaseException) -> None:
        """Let the others know that this rank ends."""
        self.meeting.share("failed", cause_of(reason))


class RankSession(EngineSession):
    """A session over one rank's engine. Every rank must make the same calls. Make one with `open_ranks`."""

    def __init__(self, manifest: Manifest, backend: RankBackend, ranks: Ranks, order: str) -> None:
        self.ranks = ranks
        try:
            orders = ranks.gather("collectives", order)
            other = next((rank for rank, one in enumerate(orders) if one != orders[0]), None)
            if other is not None:
                raise GqaExportError(f"the collectives of rank {other} are not those of rank 0: they would wait "
                                     "for one another for ever", f"rank {ranks.rank}",
                                     "start every rank on the same bundle", code="E-RUN-RANK-ORDER")
            communicator = ranks.meeting.communicator()
            ranks.gather("ready", "")
            ranks.call(lambda: backend.join(communicator), "setting the communicator")
            ranks.gather("joined", "")
            super().__init__(manifest, _Waiting(backend, ranks))
        except BaseException as error:
            ranks.fail(error)
            raise

    def step(self, input_ids: np.ndarray, new_lengths: np.ndarray | None = None, *, want_cache: bool = False) -> Step:
        """See `Session.step`. The keys, values and cache are those of this rank's heads."""
        try:
            return super().step(input_ids, new_lengths, want_cache=want_cache)
        except BaseException as error:
            self.ranks.fail(error)
            raise

    def shared_seed(self, seed: int) -> int:
        """Rank 0's seed, on every rank."""
        return int(self.ranks.gather("seed", str(seed))[0])


class _Waiting:
    """A backend that waits for its runs with an eye on the other ranks."""

    def __init__(self, inner: RankBackend, ranks: Ranks) -> None:
        self._inner, self._ranks = inner, ranks

    def allocate(self, batch: int) -> None:
        """See `EngineBackend.allocate`."""
        self._inner.allocate(batch)

    def copy_row(self, source: int, destination: int, length: int) -> None:
        """See `EngineBackend.copy_row`."""
        self._inner.copy_row(source, destination, length)

    def clear_row(self, row: int, length: int) -> None:
        """See `EngineBackend.clear_row`."""
        self._inner.clear_row(row, length)

    def run(self, ids: np.ndarray, past: np.ndarray, new: np.ndarray, row: int) -> Any:
        return self._inner.run(ids, past, new, row)

    def host(self, logits: Any) -> np.ndarray:
        self._ranks.wait(self._inner.done, "running the engine")
        return self._inner.host(logits)

    def hidden(self, rows: int, tokens: int) -> np.ndarray | None:
        """See `EngineBackend.hidden`."""
        return self._inner.hidden(rows, tokens)

    def cache(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return self._inner.cache()

    def fill_tail(self, lengths: np.ndarray, values: tuple[float, ...]) -> None:
        self._inner.fill_tail(lengths, values)


def open_ranks(folder: Path | str, *, timeout_s: float = TIMEOUT_S) -> RankSession:
    """Open this process's rank of an engine bundle.

    Args:
        folder: of the engine bundle.
        timeout_s: how long the other ranks are waited for.

    Raises:
        GqaExportError: there are not as many processes as ranks, or a rank failed.
        NotCheckedHere: there is no GPU here.
    """
    folder = Path(folder)
    parallel = read_manifest(folder).parallel
    assert parallel is not None
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), launched_rank()
    checked = check_bundle(folder)
    if size != len(parallel.ranks):
        raise GqaExportError(f"the bundle has {len(parallel.ranks)} ranks, and {size} processes run", str(folder),
                             f"torchrun --nproc-per-node {len(parallel.ranks)} -m gqa_export run {folder}",
                             code="E-RUN-RANKS")
    device = int(os.environ.get("LOCAL_RANK", "0"))
    check_device(checked.facts, device, str(folder))
    module = import_flavor(checked.facts, str(folder))
    from .device import DeviceBackend, cuda_device
    from .nccl import TorchMeeting

    ranks = Ranks(TorchMeeting(cuda_device(device), timeout_s), timeout_s)
    manifest = rank_manifest(checked.manifest, rank)
    backend = DeviceBackend(module, folder / parallel.ranks[rank].folder, manifest, cuda_device(device), False)
    return RankSession(manifest, backend, ranks, parallel.ranks[rank].collectives_sha256)
