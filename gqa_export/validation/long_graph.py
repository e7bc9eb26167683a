"""The graph for long prompts as it is run for a comparison: its selections are outputs, feeds may be anything.

The graph of the bundle is read, its selections are made outputs in memory, and ONNX Runtime takes the weights from the
bundle's folder. Dimensions as in `gqa_export.long_attention_op`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.graph_file import read_graph
from ..bundle.long_facts import PREFILL
from ..bundle.manifest import Manifest
from ..files.scratch import scratch_folder
from ..graph_io import LOGITS, past_names, past_state, present_names, present_state
from ..runtime.feeds import step_feed
from ..runtime.ort.backend import numpy_dtype
from ..runtime.ort.loading import PROVIDERS, import_onnxruntime
from ..spec import DTYPES
from ..targets import get_target


@dataclass(frozen=True)
class LongStep:
    """One call: logits [B, S, V] or [B, 1, V], and per approximated layer the selection [B, K, N]."""

    logits: np.ndarray
    selections: dict[int, np.ndarray]


@contextmanager
def long_graph_as_run(folder: Path, manifest: Manifest, dtype: str) -> Iterator[tuple[Path, Manifest]]:
    """The folder and manifest whose graph for long prompts is run: the bundle's own, or of its fp32 twin."""
    if dtype == manifest.dtype:
        yield folder, manifest
        return
    from .fp32_twin import write_twin

    with scratch_folder("twin") as place:
        yield place, write_twin(folder, place, PREFILL)


class LongGraph:
    """`prefill.onnx` of a bundle, with a cache that grows from call to call."""

    def __init__(self, folder: Path, manifest: Manifest, provider: str, threads: int = 0) -> None:
        from ..lowering.long_calls import SELECTION, expose_selections
        from ..lowering.tensorrt.interpret import interpret

        ort = import_onnxruntime()
        self.manifest, self._static = manifest, manifest.cache == "static"
        model = read_graph(folder / PREFILL)
        if get_target(manifest.target).engine:
            interpret(model)
        made = set(expose_selections(model))
        assert manifest.long is not None
        self._selections = {layer: SELECTION.format(layer) for layer in manifest.long.plan.layers
                            if SELECTION.format(layer) in made}
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, threads
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.absolute()))
        names = [PROVIDERS[provider]] + ([PROVIDERS["cpu"]] if provider != "cpu" else [])
        self._session = ort.InferenceSession(model.SerializeToString(), options, providers=names)
        spec = manifest.spec
        self._past = [name for layer in spec.owners for name in past_names(layer.layer)] + list(
            map(past_state, spec.states))
        self._present = [name for layer in spec.owners for name in present_names(layer.layer)] + list(
            map(present_state, spec.states))
        self.reset(1)

    @property
    def selecting(self) -> frozenset[int]:
        """Layers whose calls give a selection."""
        return frozenset(self._selections)

    def reset(self, batch: int) -> None:
        """An empty cache."""
        spec, room = self.manifest.spec, self.manifest.capacity if self._static else 0
        dtype = numpy_dtype(DTYPES.get(self.manifest.dtype, self.manifest.dtype))
        self._lengths = np.zeros(batch, np.int64)
        self._cache: list[Any] = [np.zeros((batch, layer.kv_num_heads, room, size), dtype) for layer in spec.owners
                                  for size in (layer.head_size, layer.value_head_size)]
        self._cache += [np.zeros((batch, *state.shape), state.dtype) for state in spec.states]

    def step(self, ids: np.ndarray, new: np.ndarray) -> LongStep:
        """Feed tokens [B, S], new [B] of them valid. A cache that grows holds no more than the longest row after it."""
        longest = int(self._lengths.max())
        feed = {**step_feed(get_target(self.manifest.target).interface, ids, self._lengths, new, longest),
                **dict(zip(self._past, self._cache))}
        names = [LOGITS, *self._present, *self._selections.values()]
        logits, *rest = self._session.run(names, feed)
        self._lengths = self._lengths + new
        after, layers = int(self._lengths.max()), 2 * len(self.manifest.spec.owners)
        present = rest[: len(self._present)]
        self._cache = [tensor if self._static or number >= layers else np.ascontiguousarray(tensor[:, :, :after])
                       for number, tensor in enumerate(present)]
        return LongStep(logits.astype(np.float32), dict(zip(self._selections, rest[len(self._present):])))
