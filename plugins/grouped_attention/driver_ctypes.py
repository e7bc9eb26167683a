"""The CUDA driver through ctypes: what `driver` calls, with the names and returns of `cuda.bindings.driver`.

For machines that have a driver and no cuda-bindings. Every call returns (status, result ...), a status being an
integer with a name. Nothing but the driver's library is needed, and that is opened by the first use.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

LIBRARY = "libcuda.so.1"
UNKNOWN = "CUDA_ERROR_UNKNOWN"


class Status(int):
    """What a driver call returned; 0 is success."""

    name: str = ""


class Driver:
    """One opened driver library. Raises OSError if it cannot be opened or has no GPU."""

    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75,
                                         CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
                                         CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=16)
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self, library: str = LIBRARY) -> None:
        self._library = ctypes.CDLL(library)
        status = self._call("cuInit", ctypes.c_uint(0))
        if status:
            raise OSError(f"cuInit of {library} failed: {status.name}")

    def _call(self, name: str, *arguments: Any) -> Status:
        status = Status(getattr(self._library, name)(*arguments))
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(ctypes.c_int(status), ctypes.byref(text))
            status.name = (text.value or UNKNOWN.encode()).decode()
        return status

    def _get(self, name: str, kind: Any, *arguments: Any) -> tuple[Status, int]:
        found = kind()
        status = self._call(name, ctypes.byref(found), *arguments)
        return status, found.value or 0

    def cuDriverGetVersion(self) -> tuple[Status, int]:
        """13000 for CUDA 13.0."""
        return self._get("cuDriverGetVersion", ctypes.c_int)

    def cuCtxGetDevice(self) -> tuple[Status, int]:
        """The device of the current context."""
        return self._get("cuCtxGetDevice", ctypes.c_int)

    def cuCtxGetCurrent(self) -> tuple[Status, int]:
        """Address of the current context."""
        return self._get("cuCtxGetCurrent", ctypes.c_void_p)

    def cuCtxGetId(self, context: int) -> tuple[Status, int]:
        """A number that no other context of this process has or will have."""
        found = ctypes.c_ulonglong()
        status = self._call("cuCtxGetId", ctypes.c_void_p(context), ctypes.byref(found))
        return status, found.value

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[Status, int]:
        """A fact about a device."""
        return self._get("cuDeviceGetAttribute", ctypes.c_int, ctypes.c_int(attribute), ctypes.c_int(device))

    def cuModuleLoadData(self, code: bytes) -> tuple[Status, int]:
        """A module from a cubin."""
        return self._get("cuModuleLoadData", ctypes.c_void_p, ctypes.c_char_p(code))

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[Status, int]:
        """A function of a module."""
        return self._get("cuModuleGetFunction", ctypes.c_void_p, ctypes.c_void_p(module), ctypes.c_char_p(name))

    def cuFuncSetAttribute(self, function: int, attribute: int, value: int) -> tuple[Status]:
        """Raise a limit of a function."""
        return (self._call("cuFuncSetAttribute", ctypes.c_void_p(function), ctypes.c_int(attribute),
                           ctypes.c_int(value)),)

    def cuLaunchKernel(self, function: int, x: int, y: int, z: int, threads_x: int, threads_y: int, threads_z: int,
                       shared_bytes: int, stream: int, arguments: tuple[Sequence[Any], Sequence[Any]],
                       _extra: int) -> tuple[Status]:
        """Launch; arguments: (values, their ctypes types), which the driver copies before it returns."""
        held = [kind(value) for value, kind in zip(*arguments, strict=True)]
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(one) for one in held))
        sizes = map(ctypes.c_uint, (x, y, z, threads_x, threads_y, threads_z, shared_bytes))
        return (self._call("cuLaunchKernel", ctypes.c_void_p(function), *sizes, ctypes.c_void_p(stream), pointers,
                           None),)


@functools.cache
def opened(library: str = LIBRARY) -> Driver:
    """The driver of this process, opened once."""
    return Driver(library)
