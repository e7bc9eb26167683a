"""The TensorRT plugin `gqa::GroupedQueryAttention`, versions 1 to 3, for TensorRT and TensorRT-RTX, from Python.

    register(trt, kernels)     once per process, before an ONNX file with the node is parsed
    register(trt)              once per process, before an engine is deserialized

Inputs, outputs, attributes and serialized fields as `fields` says; dimensions as in `gqa_export.attention_op`. The
present tensors are the memory of the past ones (aliased outputs). fp16, bf16 or fp32 for everything but the lengths
(int32), the tables of version 2 and the cache of version 3 (INT8 or FP8), linear layout. Building needs no GPU: the
kernels are compiled before (`Kernels`); running launches them through the CUDA driver. Raises nothing silently:
TensorRT swallows what a callback raises, so the first error is kept in `failures`. """

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

from gqa_plugins.grouped_attention import choose_kernels, driver, fields, launch
from gqa_plugins.grouped_attention.launch import Sizes
from gqa_plugins.grouped_attention.layers import LAYERS
from gqa_plugins.grouped_attention.plugin_layer import Carriers, Carrying, Kernels, State, check_shapes

from gqa_export.errors import GqaExportError, InvalidBundle

LENGTHS = ("past_lengths", "new_lengths", "fractions", "code_order")  # int32
ALIAS = {"present_key": "past_key", "present_value": "past_value"}
CACHES = (*ALIAS, *ALIAS.values())
MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
failures: list[GqaExportError] = []
"""What callbacks refused, oldest first: TensorRT itself only says that something failed."""


def discover() -> ModuleType:
    """The first of TensorRT and TensorRT-RTX that can be imported."""
    from importlib import import_module

    for name in MODULES:
        try:
            return import_module(name)
        except (ImportError, OSError):
            continue
    raise GqaExportError("neither TensorRT nor TensorRT-RTX can be imported", "gqa_plugins.grouped_attention.tensorrt",
                         "pip install 'gqa-export[trt]' or 'gqa-export[rtx]'", code="E-ENV-TENSORRT")


def register(trt: ModuleType | None = None, kernels: Kernels | None = None) -> Any:
    """Make the plugin known to a process's TensorRT, in every version; returns the creator of the first. kernels: to
    build engines with."""
    trt = trt or discover()
    if kernels is not None:
        fields.STORE.add(kernels.container)
    registry = trt.get_plugin_registry()
    for version in fields.CREATION_OF:
        creator = _creator(trt, version)
        creator.kernels = kernels
        if not creator.registered:
            registry.register_creator(creator, fields.NAMESPACE)
            creator.registered = True
    return _creator(trt)


def noted(method: Callable) -> Callable:
    """Keep what a callback raises: TensorRT's own message does not say it."""
    @functools.wraps(method)
    def call(*arguments: Any) -> Any:
        try:
            return method(*arguments)
        except GqaExportError as error:
            failures.append(error)
            raise
        except Exception as error:
            failures.append(GqaExportError(f"{type(error).__name__}: {error}", f"plugin callback {method.__name__}",
                                           "report it with the command that led here",
                                           code="E-ENGINE-CALLBACK"))
            raise
    return call


def _creator(trt: ModuleType, version: str = fields.PLUGIN_VERSION) -> Any:
    """The creator for one module and version of the plugin; there is one of each per process."""
    return _made(trt, version)


@functools.cache
def _made(trt: ModuleType, version: str) -> Any:
    kinds = {"int32": trt.PluginFieldType.INT32, "float32": trt.PluginFieldType.FLOAT32,
             "char": trt.PluginFieldType.CHAR}
    plugin = _plugin_class(trt, kinds)

    class Creator(trt.IPluginCreatorV3One):
        """Makes plugins from ONNX attributes (build phase) and from serialized fields (run-time phase)."""

        def __init__(self) -> None:
            super().__init__()
            self.name, self.plugin_version = fields.NAME, version
            self.plugin_namespace = fields.NAMESPACE
            self.field_names = trt.PluginFieldCollection(
                [trt.PluginField(name, b"", kinds[kind]) for name, kind in fields.CREATION_OF[version]])
            self.kernels: Kernels | None = None
            self.carriers = Carriers()
            self.registered = False

        @noted
        def create_plugin(self, name: str, collection: Any, phase: Any) -> Any:
            known = dict(fields.SERIALIZED_OF[version])
            values = {one.name: _value(one.data, known.get(one.name, "char")) for one in collection}
            where = f"attention layer {name!r}"
            if phase != trt.TensorRTPhase.BUILD:
                return plugin(State.from_fields(values, where, version), self.carriers)
            for identity in ("plugin_version", "plugin_namespace"):
                values.pop(identity, None)
            state = State(LAYERS[version].from_fields(values, where), building=True)
            return plugin(state, self.carriers, self.kernels)

    return Creator()


def _value(data: Any, kind: str) -> Any:
    if kind == "char":
        return bytes(data.tobytes()) if hasattr(data, "tobytes") else bytes(data)
    return data.item() if getattr(data, "size", 1) == 1 and hasattr(data, "item") else data[0]


def _plugin_class(trt: ModuleType, kinds: Mapping[str, Any]) -> type:
    import numpy as np

    dtypes = {trt.DataType.HALF: "fp16", trt.DataType.BF16: "bf16", trt.DataType.FLOAT: "fp32"}
    codes = {"int8": trt.DataType.INT8, "fp8": trt.DataType.FP8}
    numbers = {"int32": np.int32, "float32": np.float32}

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime):
        """One attention layer."""

        def __init__(self, state: State, carriers: Carriers, kernels: Kernels | None = None) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.state, self.carriers, self.kernels = state, carriers, kernels
            self.carrying = Carrying()
            self.plugin_name, self.plugin_version = fields.NAME, state.layer.version
            self.plugin_namespace = fields.NAMESPACE
            self.num_outputs = len(state.outputs)
            self.loaded: driver.Kernels | None = None
            self.checked: set[Sizes] = set()

        def get_capability_interface(self, _type: Any) -> Any:
            return self

        def clone(self) -> Any:
            return type(self)(self.state, self.carriers, self.kernels)

        def attach_to_context(self, _context: Any) -> Any:
            return self.clone()

        def set_tactic(self, _tactic: int) -> None:
            """There is one tactic."""

        def get_aliased_input(self, output: int) -> int:
            name = ALIAS.get(self.state.outputs[output])
            return -1 if name is None else self.state.inputs.index(name)

        def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
            of = dict(zip(self.state.inputs, types, strict=True))
            return [of[ALIAS.get(name, "query")] for name in self.state.outputs]

        @noted
        def get_output_shapes(self, inputs: Sequence[Any], _shapes: Any, build: Any) -> list[Any]:
            by_name = dict(zip(self.state.inputs, inputs, strict=True))
            query, past_key, past_value = by_name["query"], by_name["past_key"], by_name["past_value"]
            features = build.operation(trt.DimensionOperation.PROD, past_value[3],
                                       build.constant(self.state.layer.num_heads))
            shapes = [trt.DimsExprs([query[0], query[1], features]), trt.DimsExprs(past_key), trt.DimsExprs(past_value)]
            return shapes[: self.num_outputs]

        @noted
        def supports_format_combination(self, position: int, tensors: Sequence[Any], inputs: int) -> bool:
            tensor = tensors[position].desc
            if tensor.format != trt.TensorFormat.LINEAR:
                return False
            names = (*self.state.inputs, *self.state.outputs)
            if names[position] in LENGTHS:
                return tensor.type == trt.DataType.INT32
            if self.state.layer.cache and names[position] in CACHES:
                return tensor.type == codes[self.state.layer.cache]
            if names[position] == "projections":
                return tensor.type == trt.DataType.FLOAT
            return tensor.type in dtypes and tensor.type == tensors[0].desc.type

        @noted
        def configure_plugin(self, inputs: Sequence[Any], _outputs: Sequence[Any]) -> None:
            check_shapes(self.state, [one.max for one in inputs])
            largest = self.state.sizes([one.max for one in inputs], dtypes[inputs[0].desc.type])
            self.carriers.configure(self.carrying)
            if self.kernels is not None:
                self.state = replace(self.state, keys=self.kernels.of(self.state.layer, largest))

        @noted
        def get_workspace_size(self, inputs: Sequence[Any], _outputs: Sequence[Any]) -> int:
            largest = self.state.sizes([one.max for one in inputs], dtypes[inputs[0].desc.type])
            return launch.workspace_bytes(self.state.layer, largest)

        @noted
        def get_fields_to_serialize(self) -> Any:
            state = self.state
            if state.building and self.kernels is not None and self.carriers.carries(self.carrying):
                state = replace(state, container=self.kernels.container)
            made = [trt.PluginField(name, np.frombuffer(value, np.int8) if kind == "char"
                                    else np.array([value], numbers[kind]), kinds[kind])
                    for name, kind, value in state.to_fields()]
            self.kept = made  # TensorRT reads the memory after this returns
            return trt.PluginFieldCollection(made)

        @noted
        def on_shape_change(self, inputs: Sequence[Any], _outputs: Sequence[Any]) -> None:
            if not self.state.building:
                self._load([one.dims for one in inputs], dtypes[inputs[0].type])

        def _load(self, shapes: Sequence[Sequence[int]], dtype: str) -> tuple[driver.Kernels, Sizes]:
            sizes = self.state.sizes(shapes, dtype)
            if self.loaded is None or self.loaded.device.context != driver.current_device().context:
                self.loaded = driver.load(self.state.keys)
            if sizes not in self.checked:
                for cubin in self.loaded.cubins.values():
                    choose_kernels.check_cubin(cubin, self.state.layer, sizes)
                self.checked.add(sizes)
            return self.loaded, sizes

        @noted
        def enqueue(self, input_desc: Sequence[Any], _output_desc: Any, inputs: Sequence[int], outputs: Sequence[int],
                    workspace: int, stream: int) -> None:
            loaded, sizes = self._load([one.dims for one in input_desc], dtypes[input_desc[0].type])
            pointers = dict(zip(self.state.inputs, inputs, strict=True))
            results = dict(zip(self.state.outputs, outputs, strict=True))
            for present, past in ALIAS.items():
                # While it builds, TensorRT may time the layer on buffers of its own: there is no cache to keep yet.
                if not self.state.building and present in results and results[present] != pointers[past]:
                    raise InvalidBundle(f"TensorRT gave {present} other memory than {past}: the cache would not be "
                                        "written in place", "attention layer", "report it with the engine's manifest",
                                         code="E-ENGINE-ALIAS")
            pointers["output"] = results["output"]
            for one in launch.launches(self.state.layer, sizes, loaded.cubins, pointers, workspace,
                                       loaded.device.sm_count):
                driver.launch(one, loaded.functions[one.cubin.kernel], stream)

    return Plugin
