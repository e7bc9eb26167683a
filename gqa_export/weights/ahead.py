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
from ..files.atomic_replace import undisturbed
from .streams import Stream, key_of, write_streams

logger = logging.getLogger(__name__)
PAUSE_S = 0.05
"""how often progress is told while the thread still writes"""


class _Unwanted(Exception):
    """The file is no longer wanted."""


class WrittenAhead:
    """A thread that writes a file of weights; it ends with the block of this context at the latest.

    Whatever goes wrong in it (a full disk, a file that cannot be read) only means that nothing was written ahead: the
    export meets it again where it writes the weights itself, and tells of it there.

    Args:
        writer: of the bundle, in whose staging folder the file lies.
        name: of the file.
        streams: that it consists of.
    """

    def __init__(self, writer: BundleWriter, name: str, streams: Sequence[Stream]) -> None:
        self.writer, self.name = writer, name
        self._streams, self._key = streams, key_of(streams)
        self._unwanted, self._done, self._whole = threading.Event(), 0, False
        self._file: HashingFile | None = None
        self._thread = threading.Thread(target=self._run, name="weights-ahead", daemon=True)

    def __enter__(self) -> WrittenAhead:
        with undisturbed():  # which the thread inherits: else the system would give it what the main thread holds back
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):  # a full disk, whose file nobody wants
            self._end()

    def _run(self) -> None:
        try:
            self._file = self.writer.begin(self.name, self._key)
            write_streams(self._file, self._streams, self._wrote)
            self._file.sync()  # waits for the disk here, where nobody else has to
            self._whole = True
        except Exception:  # the export meets it again, see the class
            logger.debug("weights are not written ahead", exc_info=True)

    def _wrote(self, done: int) -> None:
        if self._unwanted.is_set():
            raise _Unwanted
        self._done = done

    def take(self, streams: Sequence[Stream], on_bytes: Callable[[int], None]) -> bool:
        """Whether the file consists of these streams, all of which are in it when this returns. If it does not, nothing
        is left of it.

        Args:
            streams: that the graph asks for.
            on_bytes: called with the bytes of streams so far, while the thread still writes.

        Raises:
            OSError: the file could not be closed.
        """
        wanted = key_of(streams) == self._key
        while wanted and self._thread.is_alive():
            self._thread.join(PAUSE_S)
            on_bytes(self._done)
        if wanted and self._whole:
            on_bytes(self._done)
        fact = self._end()
        if fact is None or not (wanted and self._whole):
            (self.writer.staging / self.name).unlink(missing_ok=True)
            return False
        self.writer.record(self.name, fact)
        return True

    def _end(self) -> FileFact | None:
        """Stop the thread, and close its file."""
        with undisturbed():
            self._unwanted.set()
            self._thread.join()
            file, self._file = self._file, None
            return None if file is None else file.close()
