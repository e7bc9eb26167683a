"""How one call of a graph is made: cache tensors on a device bound in place, or plain arrays through a callable.

Both backends offer the same few operations on "tensors" (a cache tensor [B, K, T, D] or a state of fixed size, wherever
it lives), so that the session above does not know which one it has. Dimensions as in `gqa_export.attention_op`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...graph_io import HIDDEN_STATES, INPUT_IDS, LOGITS
from .adapters import Adapter
from .loading import import_onnxruntime

Infer = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
Answer = tuple[np.ndarray, list[Any], np.ndarray | None]
"""logits on the host, the present tensors, and hidden states on the host where the graph gives them"""


class Backend(Protocol):
    """Calls the graph and owns the memory of the cache. device: "cpu" or "cuda"."""

    device: str

    def upload(self, array: np.ndarray) -> Any:
        """A tensor with this content. On a CPU it may share the array's memory."""

    def download(self, tensor: Any) -> np.ndarray:
        """The content, read-only; a view where the memory is the host's."""

    def row(self, tensor: Any, b: int) -> Any:
        """Row b as a tensor [1, ...] over the same memory."""

    def use(self, adapter: Adapter | None) -> None:
        """From now on, replace the graph's defaults by an adapter's values; None: by nothing."""

    def run(self, feed: Mapping[str, np.ndarray], past: Sequence[Any], inplace: bool) -> Answer:
        """Call the graph. feed: the inputs that are not the cache (`feeds.step_feed`).
        inplace: presents are written into the memory of the pasts, but those of states, the last of them."""


class ArrayBackend:
    """Cache tensors are numpy arrays; `infer` runs the graph on a dict of arrays. states: how many of the tensors, the
    last, are states of fixed size. hidden: the graph gives hidden states."""

    device = "cpu"

    def __init__(self, infer: Infer, past_names: Sequence[str], present_names: Sequence[str], states: int = 0,
                 hidden: bool = False) -> None:
        self._infer, self._past, self._present, self._hidden = infer, past_names, present_names, hidden
        self._cached = len(past_names) - states
        self._adapter: dict[str, np.ndarray] = {}

    def upload(self, array: np.ndarray) -> np.ndarray:
        """The array itself."""
        return array

    def download(self, tensor: np.ndarray) -> np.ndarray:
        """The array itself."""
        return tensor

    def row(self, tensor: np.ndarray, b: int) -> np.ndarray:
        """A view."""
        return tensor[b: b + 1]

    def use(self, adapter: Adapter | None) -> None:
        """See `Backend.use`."""
        self._adapter = adapter.arrays() if adapter else {}

    def run(self, feed: Mapping[str, np.ndarray], past: Sequence[Any], inplace: bool) -> Answer:
        """See `Backend.run`."""
        outputs = self._infer({**feed, **self._adapter, **dict(zip(self._past, past))})
        present = [outputs[name] for name in self._present]
        if inplace:
            for tensor, content in zip(past[: self._cached], present):
                np.copyto(tensor, content)
            present[: self._cached] = past[: self._cached]
        return np.asarray(outputs[LOGITS]), present, np.asarray(outputs[HIDDEN_STATES]) if self._hidden else None


@dataclass(frozen=True)
class DeviceTensor:
    """Memory that a graph reads or writes. owner: what keeps it alive, an OrtValue or a numpy array. fp32: it is that
    whatever the type of the cache is, as states are. part: it is a row of another tensor."""

    owner: Any
    pointer: int
    shape: tuple[int, ...]
    fp32: bool = False
    part: bool = False


@dataclass(frozen=True)
class _Logits:
    """The output of logits: its type, its size for each token, and whether only the last token of a row has some."""

    dtype: np.dtype
    vocabulary: int
    last: bool

    @classmethod
    def of(cls, session: Any) -> _Logits | None:
        """What a session says of it; None where that leaves something open."""
        found = [port for port in session.get_outputs() if port.name == LOGITS]
        dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}.get(found[0].type) if found else None
        if dtype is None or len(found[0].shape) != 3 or not isinstance(found[0].shape[2], int):
            return None
        return cls(np.dtype(dtype), found[0].shape[2], found[0].shape[1] == 1)

    def room(self, ids: tuple[int, ...]) -> np.ndarray:
        """Memory for the logits of ids of this shape."""
        return np.empty((ids[0], 1 if self.last else ids[1], self.vocabulary), self.dtype)


class BindingBackend:
    """Cache tensors stay on the device of the provider and are handed to ONNX Runtime by address."""

    def __init__(self, session: Any, device: str, dtype: str, past_names: Sequence[str],
                 present_names: Sequence[str], states: int = 0, hidden: bool = False) -> None:
        self._answers = [HIDDEN_STATES, LOGITS] if hidden else [LOGITS]
        self._session, self.device, self._past, self._present = session, device, past_names, present_names
        self._ort = import_onnxruntime()
        self._dtype = numpy_dtype(dtype)
        self._cached = len(past_names) - states
        self._kept: dict[tuple[Any, ...], Any] = {}
        self._spare: list[DeviceTensor] = []
        self._adapter: Adapter | None = None
        self._logits = _Logits.of(session) if len(self._answers) == 1 else None
        # ONNX's number for bfloat16, which numpy does not know
        self._element: Any = 16 if dtype == "bfloat16" else self._dtype.type

    def upload(self, array: np.ndarray) -> DeviceTensor:
        """On a CPU the array's own memory; elsewhere a copy on the device."""
        fp32 = array.dtype == np.float32 and self._dtype != np.float32
        array = np.ascontiguousarray(array, dtype=np.float32 if fp32 else self._dtype)
        if self.device == "cpu":
            return DeviceTensor(array, array.ctypes.data, array.shape, fp32)
        if self._element == 16 and not fp32:
            host = self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.int16), 16)
            value = self._ort.OrtValue.ortvalue_from_shape_and_type(array.shape, 16, self.device)
            value.update_inplace(host.numpy())
        else:
            value = self._ort.OrtValue.ortvalue_from_numpy(array, self.device)
        return DeviceTensor(value, value.data_ptr(), array.shape, fp32)

    def download(self, tensor: DeviceTensor) -> np.ndarray:
        """See `Backend.download`."""
        if isinstance(tensor.owner, np.ndarray):
            return tensor.owner
        return self._host(tensor.owner, tensor.fp32)

    def _host(self, value: Any, fp32: bool = False) -> np.ndarray:
        low = self._element == 16 and not fp32
        if value.device_name().lower() == "cpu" and not low:
            # an empty tensor has no address, which DLPack refuses
            return np.from_dlpack(value) if math.prod(value.shape()) else np.zeros(value.shape(), self._dtype)
        if low:
            import torch

            return torch.utils.dlpack.from_dlpack(value).cpu().view(torch.int16).numpy().view(self._dtype)
        return value.numpy()

    def row(self, tensor: DeviceTensor, b: int) -> DeviceTensor:
        """The same memory, b rows further on."""
        step = math.prod(tensor.shape[1:]) * (4 if tensor.fp32 else self._dtype.itemsize)
        owner = tensor.owner[b: b + 1] if isinstance(tensor.owner, np.ndarray) else tensor.owner
        return DeviceTensor(owner, tensor.pointer + b * step, (1, *tensor.shape[1:]), tensor.fp32, part=True)

    def use(self, adapter: Adapter | None) -> None:
        """See `Backend.use`."""
        self._adapter = adapter
        self._kept = {}  # bindings have the values of the adapter before

    def run(self, feed: Mapping[str, np.ndarray], past: Sequence[Any], inplace: bool) -> Answer:
        """See `Backend.run`."""
        spare = self._spare_states(past[self._cached:])
        binding = self._bound(past, spare, inplace)
        for name, array in feed.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        room = self._logits.room(feed[INPUT_IDS].shape) if inplace and self._logits else None
        if room is None:
            for name in self._answers:  # bound after the cache, and so the last of the outputs
                binding.bind_output(name, "cpu")
        else:  # asking for the outputs of a binding makes an object of every one of them, 0.4 ms for thirty
            binding.bind_output(LOGITS, "cpu", 0, room.dtype.type, room.shape, room.ctypes.data)
        self._session.run_with_iobinding(binding)
        # the next step may write where this one read
        states = past[self._cached:]
        self._spare = [] if any(tensor.part for tensor in states) else list(states)
        if room is not None:
            return room, [*past[: self._cached], *spare], None
        outputs = binding.get_outputs()
        hidden = self._host(outputs[-2]) if len(self._answers) > 1 else None
        cached = past[: self._cached] if inplace else [
            DeviceTensor(v, v.data_ptr(), tuple(v.shape())) for v in outputs[: self._cached]]
        return self._host(outputs[-1]), [*cached, *spare], hidden

    def _spare_states(self, states: Sequence[DeviceTensor]) -> list[DeviceTensor]:
        """Memory for the new states, other than that of the old ones: what the step before read, where it fits."""
        if [tensor.shape for tensor in self._spare] == [tensor.shape for tensor in states] and not (
                {tensor.pointer for tensor in self._spare} & {tensor.pointer for tensor in states}):
            return self._spare
        return [self.upload(np.zeros(tensor.shape, np.float32)) for tensor in states]

    def _bound(self, past: Sequence[DeviceTensor], spare: Sequence[DeviceTensor], inplace: bool) -> Any:
        """A binding of the cache. A static one keeps its memory from step to step, and so its binding: a hundred
        calls for thirty layers, 1 ms a step, are made once (twice with states, which change places)."""
        # all tensors have the batch of the first, and what else is in their shapes does not change
        key = (past[0].shape, *[tensor.pointer for tensor in past], *[tensor.pointer for tensor in spare])
        if inplace and key in self._kept:
            return self._kept[key]
        binding = self._session.io_binding()
        for name, tensor in zip(self._past, past):
            element = np.float32 if tensor.fp32 else self._element
            if tensor.pointer:
                binding.bind_input(name, self.device, 0, element, tensor.shape, tensor.pointer)
            else:  # an empty tensor on a device has no address
                binding.bind_ortvalue_input(name, tensor.owner)
        for name, value in (self._adapter.values if self._adapter else {}).items():
            binding.bind_ortvalue_input(name, value)
        for name, tensor in zip(self._present, [*past[: self._cached], *spare]):
            if inplace or name in self._present[self._cached:]:
                element = np.float32 if tensor.fp32 else self._element
                binding.bind_output(name, self.device, 0, element, tensor.shape, tensor.pointer)
            else:
                binding.bind_output(name, self.device)
        if inplace:
            self._kept = {**dict(list(self._kept.items())[-1:]), key: binding} if spare else {key: binding}
        return binding


def numpy_dtype(name: str) -> np.dtype:
    """numpy's dtype of a name such as "float16"; bfloat16 comes from ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)
