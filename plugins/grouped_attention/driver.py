"""Loads compiled kernels and launches them through the CUDA driver: by `cuda.bindings`, else by ctypes, on first use.

Building an engine needs none of this; running one needs the driver. Everything happens in the context that is current
(TensorRT's) on the stream that is given. Loading is not allowed while a stream is captured: load first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gqa_plugins.grouped_attention import driver_ctypes
from gqa_plugins.grouped_attention.choose_kernels import pick
from gqa_plugins.grouped_attention.cubin import Cubin
from gqa_plugins.grouped_attention.fields import STORE, Key
from gqa_plugins.grouped_attention.launch import Launch

from gqa_export.errors import GqaExportError

FREE_SHARED_BYTES = 48 * 1024  # what a kernel may use without asking


@dataclass(frozen=True)
class Device:
    """The GPU of the current context. context: its id, which no later context gets, unlike its address."""

    context: int
    capability: int
    sm_count: int


@dataclass(frozen=True)
class Kernels:
    """The kernels of one layer, loaded on one device: name -> (facts, CUfunction)."""

    device: Device
    cubins: Mapping[str, Cubin]
    functions: Mapping[str, Any]


_LOADED: dict[tuple[int, str], tuple[Cubin, Any, Any]] = {}


def bindings() -> Any:
    """`cuda.bindings.driver`, or where that is not installed the same calls through ctypes. Raises GqaExportError where
    the driver cannot be opened either."""
    try:
        from cuda.bindings import driver
    except ImportError:
        try:
            return driver_ctypes.opened()
        except OSError as error:
            raise GqaExportError("the engine's attention layers are launched through the CUDA driver: cuda-bindings is "
                                 f"not installed, and the driver cannot be opened without it ({error})",
                                 "cuda.bindings.driver", "pip install 'gqa-export[plugins]'; see `gqa-export doctor` "
                                 "for the driver", code="E-ENV-CUDA-BINDINGS") from error
    return driver


def _call(name: str, *arguments: Any) -> Any:
    driver = bindings()
    status, *results = getattr(driver, name)(*arguments)
    if int(status) != 0:
        what = getattr(status, "name", str(status))
        raise GqaExportError(f"the CUDA driver refused {name}: {what}", "the engine's attention layers",
                             "see `gqa-export doctor`; a driver of CUDA 13 or newer is needed", code="E-ENGINE-DRIVER")
    return results[0] if len(results) == 1 else results


def current_device() -> Device:
    """Facts of the GPU whose context is current."""
    driver = bindings()
    attribute = driver.CUdevice_attribute
    device = _call("cuCtxGetDevice")
    major, minor, sms = (_call("cuDeviceGetAttribute", getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), device)
                         for name in ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "MULTIPROCESSOR_COUNT"))
    return Device(int(_call("cuCtxGetId", _call("cuCtxGetCurrent"))), int(major) * 10 + int(minor), int(sms))


def load(keys: Sequence[Key]) -> Kernels:
    """Load a layer's kernels for the current device; what another layer loaded is used again."""
    device = current_device()
    chosen = {name: _load(device, key) for name, key in pick(keys, device.capability).items()}
    return Kernels(device, {name: one[0] for name, one in chosen.items()},
                   {name: one[1] for name, one in chosen.items()})


def _load(device: Device, key: Key) -> tuple[Cubin, Any, Any]:
    place = (device.context, key.sha256)
    if place not in _LOADED:
        cubin = Cubin.from_bytes(STORE.get(key.sha256), f"kernel {key.kernel} of the engine")
        module = _call("cuModuleLoadData", cubin.code)
        function = _call("cuModuleGetFunction", module, cubin.name.encode())
        if cubin.shared_bytes > FREE_SHARED_BYTES:
            wanted = bindings().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _call("cuFuncSetAttribute", function, wanted, cubin.shared_bytes)
        _LOADED[place] = (cubin, function, module)
    return _LOADED[place]


def launch(one: Launch, function: Any, stream: int) -> None:
    """Put one launch on a stream. Safe while the stream is captured."""
    _call("cuLaunchKernel", function, *one.grid, one.cubin.threads, 1, 1, one.cubin.shared_bytes, stream,
          one.parameters(), 0)
