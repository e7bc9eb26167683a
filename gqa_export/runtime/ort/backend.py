"""How one call of a graph is made: cache tensors on a device bound in place, or plain arrays through a callable.

Both backends offer the same few operations on "tensors" (a cache tensor [B, K, T, D], wherever it lives), so that
the session above does not know which one it has. Dimensions as in `gqa_export.attention_op`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...graph_io import LOGITS
from .loading import import_onnxruntime

Infer = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


class Backend(Protocol):
    """Calls the graph and owns the memory of the cache."""

    def upload(self, array: np.ndarray) -> Any:
        """A tensor with this content. On a CPU it may share the array's memory."""

    def download(self, tensor: Any) -> np.ndarray:
        """The content, read-only; a view where the memory is the host's."""

    def row(self, tensor: Any, b: int) -> Any:
        """Row b as a tensor [1, ...] over the same memory."""

    def run(self, feed: Mapping[str, np.ndarray], past: Sequence[Any], inplace: bool) -> tuple[np.ndarray, list[Any]]:
        """Logits on the host and the present tensors. feed: the inputs that are not the cache (`feeds.step_feed`).
        inplace: presents are written into the memory of the pasts."""


class ArrayBackend:
    """Cache tensors are numpy arrays; `infer` runs the graph on a dict of arrays."""

    def __init__(self, infer: Infer, past_names: Sequence[str], present_names: Sequence[str]) -> None:
        self._infer, self._past, self._present = infer, past_names, present_names

    def upload(self, array: np.ndarray) -> np.ndarray:
        """The array itself."""
        return array

    def download(self, tensor: np.ndarray) -> np.ndarray:
        """The array itself."""
        return tensor

    def row(self, tensor: np.ndarray, b: int) -> np.ndarray:
        """A view."""
        return tensor[b: b + 1]

    def run(self, feed: Mapping[str, np.ndarray], past: Sequence[Any], inplace: bool) -> tuple[np.ndarray, list[Any]]:
        """See `Backend.run`."""
        outputs = self._infer({**feed, **dict(zip(self._past, past))})
        present = [outputs[name] for name in self._present]
        if inplace:
            for tensor, content in zip(past, present):
                np.copyto(tensor, content)
            present = list(past)
        return np.asarray(outputs[LOGITS]), present


@dataclass(frozen=True)
class DeviceTensor:
    """Memory that a graph reads or writes. owner: what keeps it alive, an OrtValue or a numpy array."""

    owner: Any
    pointer: int
    shape: tuple[int, ...]


class BindingBackend:
    """Cache tensors stay on the device of the provider and are handed to ONNX Runtime by address."""

    def __init__(self, session: Any, device: str, dtype: str, past_names: Sequence[str],
                 present_names: Sequence[str]) -> None:
        self._session, self._device, self._past, self._present = session, device, past_names, present_names
        self._ort = import_onnxruntime()
        self._dtype = numpy_dtype(dtype)
        self._kept: tuple[list[Any], Any] | None = None
        # ONNX's number for bfloat16, which numpy does not know
        self._element: Any = 16 if dtype == "bfloat16" else self._dtype.type

    def upload(self, array: np.ndarray) -> DeviceTensor:
        """On a CPU the array's own memory; elsewhere a copy on the device."""
        array = np.ascontiguousarray(array, dtype=self._dtype)
        if self._device == "cpu":
            return DeviceTensor(array, array.ctypes.data, array.shape)
        if self._element == 16:
            host = self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.int16), 16)
            value = self._ort.OrtValue.ortvalue_from_shape_and_type(array.shape, 16, self._device)
            value.update_inplace(host.numpy())
        else:
            value = self._ort.OrtValue.ortvalue_from_numpy(array, self._device)
        return DeviceTensor(value, value.data_ptr(), array.shape)

    def download(self, tensor: DeviceTensor) -> np.ndarray:
        """See `Backend.download`."""
        if isinstance(tensor.owner, np.ndarray):
            return tensor.owner
        return self._host(tensor.owner)

    def _host(self, value: Any) -> np.ndarray:
        if value.device_name().lower() == "cpu" and self._element != 16:
            # an empty tensor has no address, which DLPack refuses
            return np.from_dlpack(value) if math.prod(value.shape()) else np.zeros(value.shape(), self._dtype)
        if self._element == 16:
            import torch

            return torch.utils.dlpack.from_dlpack(value).cpu().view(torch.int16).numpy().view(self._dtype)
        return value.numpy()

    def row(self, tensor: DeviceTensor, b: int) -> DeviceTensor:
        """The same memory, b rows further on."""
        step = math.prod(tensor.shape[1:]) * self._dtype.itemsize
        owner = tensor.owner[b: b + 1] if isinstance(tensor.owner, np.ndarray) else tensor.owner
        return DeviceTensor(owner, tensor.pointer + b * step, (1, *tensor.shape[1:]))

    def run(self, feed: Mapping[str, np.ndarray], past: Sequence[Any], inplace: bool) -> tuple[np.ndarray, list[Any]]:
        """See `Backend.run`."""
        binding = self._bound(past, inplace)
        for name, array in feed.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        binding.bind_output(LOGITS, "cpu")  # bound after the cache, and so the last of the outputs
        self._session.run_with_iobinding(binding)
        if inplace:
            return self._host(binding.get_outputs()[-1]), list(past)
        *present, logits = binding.get_outputs()
        return self._host(logits), [DeviceTensor(v, v.data_ptr(), tuple(v.shape())) for v in present]

    def _bound(self, past: Sequence[DeviceTensor], inplace: bool) -> Any:
        """A binding of the cache. A static one keeps its memory from step to step, and so its binding: a hundred
        calls for thirty layers, 1 ms a step, are made once."""
        key = [(tensor.pointer, tensor.shape) for tensor in past]
        if inplace and self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        binding = self._session.io_binding()
        for name, tensor in zip(self._past, past):
            if tensor.pointer:
                binding.bind_input(name, self._device, 0, self._element, tensor.shape, tensor.pointer)
            else:  # an empty tensor on a device has no address
                binding.bind_ortvalue_input(name, tensor.owner)
        for name, tensor in zip(self._present, past):
            if inplace:
                binding.bind_output(name, self._device, 0, self._element, tensor.shape, tensor.pointer)
            else:
                binding.bind_output(name, self._device)
        self._kept = (key, binding) if inplace else None
        return binding


def numpy_dtype(name: str) -> np.dtype:
    """numpy's dtype of a name such as "float16"; bfloat16 comes from ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)
