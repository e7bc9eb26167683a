"""Weights that are written while the model is still being traced.

Their order in `model.onnx.data` is that of the graph, which is not there yet. Where it can be told beforehand
(`exporting.expected_weights`) a thread writes them in that order, beside the work that has nothing to do with them;
reading, hashing and writing do without Python's lock. When the graph is there its own order decides: the file is taken
if it is the one that would have been written now, and removed otherwise.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from types import TracebackType

from ..bundle.manifest import FileFact
from ..bundle.writer import BundleWriter, HashingFile
from ..errors import GqaExportError
from ..files.atomic_replace import remove_file, undisturbed
from .streams import Stream, key_of, write_streams

logger = logging.getLogger(__name__)
PAUSE_S = 0.05
"""how often progress is told while the thread still writes"""
SYNC_BYTES = 256 << 20
"""written between two waits for the disk: as much as an export that ends may have to wait for"""


class _Unwanted(Exception):
    """The file is no longer wanted."""


class WrittenAhead:
    """A thread that writes a file of weights, from `start` on; it ends with the block of this context at the latest.

    What goes wrong in it (a full disk, a value that the type does not hold) is told by `take`, if this is the file that
    the graph asks for: to write it once more would go wrong in the same place. Of another file it does not matter.

    Args:
        writer: of the bundle, in whose staging folder the file lies.
        name: of the file.
        streams: that it consists of.
    """

    def __init__(self, writer: BundleWriter, name: str, streams: Sequence[Stream]) -> None:
        self.writer, self.name = writer, name
        self._streams, self._key = streams, key_of(streams)
        self._unwanted, self._awaited, self._done = threading.Event(), threading.Event(), 0
        self._fact: FileFact | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="weights-ahead", daemon=True)

    def __enter__(self) -> WrittenAhead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._end()

    def start(self) -> None:
        """Begin, inside the block that ends it: an interrupt while it starts must find it in somebody's hands."""
        with undisturbed():
            self._thread.start()

    def _run(self) -> None:
        try:
            self._check()
            file = self.writer.begin(self.name, self._key)
            try:
                self._write(file)
            except BaseException:
                with contextlib.suppress(OSError):  # what is left in its buffer
                    file.close()
                raise
            self._fact = file.close()
        except Exception as error:
            logger.debug("weights are not written ahead", exc_info=True)
            self._error = error

    def _write(self, file: HashingFile) -> None:
        synced = 0

        def wrote(done: int) -> None:
            nonlocal synced
            self._check()
            self._done = done
            if not self._awaited.is_set() and file.tell() - synced >= SYNC_BYTES:
                file.sync()
                synced = file.tell()

        write_streams(file, self._streams, wrote)
        self._check()
        if not self._awaited.is_set():
            file.sync()  # waits for the disk here, where nobody else has to

    def _check(self) -> None:
        if self._unwanted.is_set():
            raise _Unwanted

    def take(self, streams: Sequence[Stream], on_bytes: Callable[[int], None]) -> bool:
        """Whether the file consists of these streams, all of which are in it when this returns. If it does not, nothing
        is left of it.

        Args:
            streams: that the graph asks for.
            on_bytes: called with the bytes of streams so far, while the thread still writes.

        Raises:
            GqaExportError: a weight of the file cannot be read, or its new type does not hold it.
            OSError: the file could not be written, or not removed.
        """
        wanted = self._key == key_of(streams) != ""
        if wanted:
            self._awaited.set()
            while self._thread.is_alive():
                self._thread.join(PAUSE_S)
                on_bytes(self._done)
            if self._fact is not None:
                on_bytes(self._done)
                self.writer.record(self.name, self._fact)
                return True
        else:
            self._end()
        remove_file(self.writer.staging / self.name)
        if wanted and isinstance(self._error, GqaExportError | OSError):
            raise self._error
        return False

    def _end(self) -> None:
        """Stop the thread, which closes its file. An interrupt meanwhile ends the waiting, and no more."""
        self._unwanted.set()
        while self._thread.is_alive():
            self._thread.join(PAUSE_S)
