"""Anybody's decoder in the plainest loop: one sequence, greedy, past and present one buffer, all bound by address.

For comparing the speed of graphs, not of runners: names and axes are read from the graph, so a model of another
exporter with the same kind of inputs runs in it too. C capacity, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gqa_export.errors import GqaExportError
from gqa_export.runtime.ort.loading import ORT_TYPES, import_onnxruntime


@dataclass(frozen=True)
class Timing:
    """Decode steps of one graph, milliseconds each, and the tokens they gave."""

    name: str
    nodes: int
    load_s: float
    prefill_ms: float
    steps_ms: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def median_ms(self) -> float:
        """Median step."""
        return statistics.median(self.steps_ms)

    @property
    def tokens_per_s(self) -> float:
        """From the median step."""
        return 1000 / self.median_ms


class RawDecoder:
    """One sequence in one graph. head_size: D, for graphs that leave it open.

    The cache inputs are those with four axes; input i of them belongs to output i of those with four axes.
    """

    def __init__(self, model: Path, capacity: int, head_size: int, *, threads: int = 0, spinning: bool = False) -> None:
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        # the threads of the session that waits would spin against the one that works
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
        started = time.perf_counter()
        self._session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self.load_s = time.perf_counter() - started
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self._others = [port.name for port in inputs if len(port.shape) != 4]
        unknown = set(self._others) - {"input_ids", "attention_mask", "position_ids"}
        if unknown:
            raise GqaExportError(f"the graph has inputs that this loop does not know: {', '.join(sorted(unknown))}",
                                 str(model), "compare decoders with input_ids, attention_mask and a cache",
                                 code="E-RUN-INPUTS")
        past = [port for port in inputs if len(port.shape) == 4]
        present = [port.name for port in outputs if len(port.shape) == 4]
        self._logits = next(port.name for port in outputs if len(port.shape) != 4)
        self._binding = self._session.io_binding()
        self._buffers = []
        for port, name in zip(past, present, strict=True):
            dtype = np.dtype(ORT_TYPES[port.type])
            size = port.shape[3] if isinstance(port.shape[3], int) else head_size
            buffer = np.zeros((1, port.shape[1], capacity, size), dtype)
            self._buffers.append(buffer)
            address = ("cpu", 0, dtype.type, buffer.shape, buffer.ctypes.data)
            self._binding.bind_input(port.name, *address)
            self._binding.bind_output(name, *address)
        self.capacity, self.length = capacity, 0
        self._mask = np.ones((1, capacity), np.int64)

    def step(self, ids: Sequence[int]) -> int:
        """Feed ids; the most probable next token."""
        total = self.length + len(ids)
        if total > self.capacity:
            raise GqaExportError(f"the buffer holds {self.capacity} tokens, and {total} do not fit", "raw loop",
                                 "take fewer steps", code="E-RUN-CAPACITY")
        feed: dict[str, Any] = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": self._mask[:, :total],
            "position_ids": np.arange(self.length, total)[None],
        }
        for name in self._others:
            self._binding.bind_cpu_input(name, np.ascontiguousarray(feed[name]))
        self._binding.bind_output(self._logits, "cpu")  # bound after the cache, and so the last of the outputs
        self._session.run_with_iobinding(self._binding)
        self.length = total
        return int(np.from_dlpack(self._binding.get_outputs()[-1])[0, -1].argmax())


def interleave(models: dict[str, tuple[Path, int]], prompt: Sequence[int], steps: int, *, threads: int = 0,
               spinning: bool = False) -> list[Timing]:
    """Decode with several graphs at once, one step each in turn, so that a busy machine slows all of them alike.

    models: name -> (ONNX file, head size). Who goes first changes from step to step. Each feeds its own tokens.
    """
    decoders = {name: RawDecoder(path, len(prompt) + steps + 1, head, threads=threads, spinning=spinning)
                for name, (path, head) in models.items()}
    prefill: dict[str, float] = {}
    steps_ms: dict[str, list[float]] = {name: [] for name in models}
    tokens: dict[str, list[int]] = {name: [] for name in models}
    for name, decoder in decoders.items():
        started = time.perf_counter()
        tokens[name].append(decoder.step(prompt))
        prefill[name] = 1000 * (time.perf_counter() - started)
    names = list(models)
    for number in range(steps):
        for name in names if number % 2 else reversed(names):
            started = time.perf_counter()
            token = decoders[name].step(tokens[name][-1:])
            steps_ms[name].append(1000 * (time.perf_counter() - started))
            tokens[name].append(token)
    return [Timing(name, count_nodes(models[name][0]), decoders[name].load_s, prefill[name], tuple(steps_ms[name]),
                   tuple(tokens[name])) for name in names]


def count_nodes(model: Path) -> int:
    """Nodes of a graph, its weights not read."""
    import onnx

    return len(onnx.load(str(model), load_external_data=False).graph.node)
