"""ONNX Runtime's answers written into arrays made for them, so that no answer is in memory twice.

`InferenceSession.run` gives copies of tensors that lie in an arena of ONNX Runtime's own, which grows by powers of two
and is kept: of a growing cache, all of it at every step. Polygraphy's runner calls the class below instead, whose `run`
binds arrays of the right sizes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..runtime.ort.loading import ORT_TYPES

UNKNOWN = frozenset(("bfloat16",))
"""formats that numpy does not know"""


class BoundOutputs:
    """A session of ONNX Runtime on a CPU, as far as Polygraphy's `OnnxrtRunner` needs one.

    session: the `onnxruntime.InferenceSession`. Where the sizes of its outputs do not follow from those of its inputs
    it is run as ever.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._inputs, self._outputs = session.get_inputs(), session.get_outputs()
        names = [ORT_TYPES.get(port.type, "bfloat16") for port in self._outputs]
        self._dtypes = [] if UNKNOWN & set(names) else [np.dtype(name) for name in names]

    def get_inputs(self) -> Sequence[Any]:
        """As of the session."""
        return list(self._inputs)

    def get_outputs(self) -> Sequence[Any]:
        """As of the session."""
        return list(self._outputs)

    def run(self, names: None, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """All outputs, in order. names: None, as Polygraphy gives it."""
        # an adapter's factors are initializers that a feed may replace, and those cannot be bound
        made = self._arrays(feed) if feed.keys() <= {port.name for port in self._inputs} else []
        if not made:
            answers: list[np.ndarray] = self._session.run(names, feed)
            return answers
        binding = self._session.io_binding()
        for name, array in feed.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for port, array in zip(self._outputs, made, strict=True):
            binding.bind_output(port.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding)
        return made

    def _arrays(self, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Memory for every output; empty where a type or a size is not known, or nothing is to be written to one."""
        sizes = {axis: size for port in self._inputs if port.name in feed
                 for axis, size in zip(port.shape, feed[port.name].shape) if isinstance(axis, str)}
        shapes = [[sizes.get(axis, -1) if not isinstance(axis, int) else axis for axis in port.shape]
                  for port in self._outputs]
        if not self._dtypes or any(size < 1 for shape in shapes for size in shape):
            return []
        return [np.empty(shape, dtype) for shape, dtype in zip(shapes, self._dtypes)]
