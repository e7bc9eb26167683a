"""Just enough of TensorRT's Python module to hold the plugin and of the CUDA driver to launch it, without either."""

from __future__ import annotations

import ctypes
import enum
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np


class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT32, INT8, FP8 = range(6)


class PluginFieldType(enum.Enum):
    INT32, FLOAT32, CHAR = range(3)


class TensorFormat(enum.Enum):
    LINEAR, CHW4 = range(2)


class TensorRTPhase(enum.Enum):
    BUILD, RUNTIME = range(2)


class DimensionOperation(enum.Enum):
    SUM, PROD = range(2)


class PluginField:
    """Keeps its data as TensorRT gives it back: an array."""

    def __init__(self, name: str, data: Any = b"", type: PluginFieldType = PluginFieldType.CHAR) -> None:
        self.name, self.type = name, type
        self.data = np.frombuffer(data, np.int8) if isinstance(data, bytes) else data


class Registry:
    """Remembers creators."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True


class Expressions:
    """Shapes are plain numbers here."""

    def constant(self, value: int) -> int:
        return value

    def operation(self, kind: DimensionOperation, left: int, right: int) -> int:
        assert kind is DimensionOperation.PROD
        return left * right


def module() -> ModuleType:
    """A new module with a registry of its own."""
    made = ModuleType("fake_tensorrt")
    registry = Registry()
    bases = {name: type(name, (), {}) for name in ("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuildV2",
                                                   "IPluginV3OneRuntime", "IPluginCreatorV3One")}
    vars(made).update(DataType=DataType, PluginFieldType=PluginFieldType, TensorFormat=TensorFormat,
                      TensorRTPhase=TensorRTPhase, DimensionOperation=DimensionOperation, PluginField=PluginField,
                      PluginFieldCollection=list, DimsExprs=list, get_plugin_registry=lambda: registry, **bases)
    return made


def tensor(shape: tuple[int, ...], type: DataType, format: TensorFormat = TensorFormat.LINEAR) -> SimpleNamespace:
    """A tensor's description, at run time and (with `desc` and `max`) while building."""
    described = SimpleNamespace(dims=shape, type=type, format=format)
    return SimpleNamespace(desc=described, min=shape, opt=shape, max=shape, **vars(described))


class Driver(ModuleType):
    """`cuda.bindings.driver` of one GPU; notes every call that loads or launches."""

    class CUdevice_attribute(enum.Enum):
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16

    class CUfunction_attribute(enum.Enum):
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    def __init__(self, capability: int = 89, sm_count: int = 58, context: int = 7) -> None:
        super().__init__("cuda.bindings.driver")
        self.facts = {75: capability // 10, 76: capability % 10, 16: sm_count}
        self.context, self.context_id, self.calls = context, 1, []
        self.refuses = ""

    def _note(self, name: str, *arguments: Any) -> int:
        self.calls.append((name, *arguments))
        return 700 if name == self.refuses else 0

    def cuCtxGetCurrent(self) -> tuple[int, int]:
        return 0, self.context

    def cuCtxGetId(self, context: int) -> tuple[int, int]:
        assert context == self.context
        return 0, self.context_id

    def cuCtxGetDevice(self) -> tuple[int, int]:
        return 0, 0

    def cuDeviceGetAttribute(self, attribute: Any, _device: int) -> tuple[int, int]:
        return 0, self.facts[attribute.value]

    def cuModuleLoadData(self, code: bytes) -> tuple[int, str]:
        return self._note("load", code), f"module of {code.decode()}"

    def cuModuleGetFunction(self, loaded: str, name: bytes) -> tuple[int, str]:
        return 0, f"{name.decode()} in {loaded}"

    def cuFuncSetAttribute(self, function: str, attribute: Any, value: int) -> tuple[int]:
        return (self._note("shared", function, attribute.value, value),)

    def cuLaunchKernel(self, function: str, *rest: Any) -> tuple[int]:
        values, types = rest[8]
        packed = [kind(value).value for value, kind in zip(values, types, strict=True)]
        assert all(kind in (ctypes.c_void_p, ctypes.c_int32, ctypes.c_float) for kind in types)
        return (self._note("launch", function, rest[:8], packed),)
