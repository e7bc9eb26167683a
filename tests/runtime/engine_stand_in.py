"""A pretended TensorRT over pretended CUDA: engines are ONNX graphs run by ONNX Runtime at the addresses it is given.

The engine file names the folder of an interpreted graph. A context reads its inputs from the memory it was told of and
writes its outputs there, so binding, aliasing, slicing of the cache and graph capture are the runtime's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import torch
from gqa_plugins.grouped_attention import fields

from gqa_export.bundle.engine_facts import DECODE, ENGINE, PREFILL, EngineFacts, PluginFacts, ProfileFacts
from gqa_export.bundle.manifest import MANIFEST, FileFact, Manifest, read_manifest
from gqa_export.files.sha256 import file_sha256
from gqa_export.graph_io import past_names, present_names

VERSION = "9.9.9"
CAPABILITY = 89
KERNELS = fields.pack([b"append kernel", b"decode kernel"])


def write_engine(folder: Path, graph: Path, source: Manifest, *, max_batch: int = 3, max_prompt: int = 8,
                 **changes: Any) -> Path:
    """An engine bundle whose engine is the interpreted graph in `graph`. changes: other facts of the engine."""
    import hashlib

    folder.mkdir(parents=True)
    (folder / ENGINE).write_bytes(f"stand-in:{graph}\n".encode() + KERNELS + b"profile 2" + KERNELS)
    pairs = [pair for layer in source.spec.layers for pair in zip(present_names(layer.layer), past_names(layer.layer))]
    plugin = None
    if source.target == "trt-plugin":
        plugin = PluginFacts(fields.NAME, "1", "gqa", 1, hashlib.sha256(KERNELS).hexdigest())
    facts = EngineFacts("rtx", VERSION, (80, CAPABILITY), source.target.removeprefix("trt-"),
                        tuple(_profile(name, source, max_batch, steps)
                              for name, steps in ((DECODE, 1), (PREFILL, max_prompt))),
                        dict(pairs), plugin, len(source.spec.layers) if plugin else 0,
                        build={"layers": {"decode": {"PluginV3": 2}}})
    made = replace(source, engine=replace(facts, **changes), files={
        ENGINE: FileFact((folder / ENGINE).stat().st_size, file_sha256(folder / ENGINE))})
    (folder / MANIFEST).write_text(made.to_json())
    return folder


def _profile(name: str, source: Manifest, max_batch: int, steps: int) -> ProfileFacts:
    def shape(fact: Any, batch: int, new: int) -> tuple[int, ...]:
        return tuple({"batch": batch, "sequence": new}.get(axis, axis) for axis in fact.shape)

    return ProfileFacts(name, {fact.name: (shape(fact, 1, 1), shape(fact, 1, steps), shape(fact, max_batch, steps))
                               for fact in source.inputs})


def refacts(folder: Path, **changes: Any) -> Path:
    """Change facts of an engine bundle."""
    manifest = read_manifest(folder)
    (folder / MANIFEST).write_text(replace(manifest, engine=replace(manifest.engine, **changes)).to_json())
    return folder


@dataclass
class Device:
    """What happened. plain: executions outside graphs, by profile number; captured, replayed: of graphs; bound: every
    (tensor's name, address)."""

    plain: list[int] = field(default_factory=list)
    captured: int = 0
    replayed: int = 0
    capturing: list | None = None
    fail: bool = False
    bound: list[tuple[str, int]] = field(default_factory=list)


class Context:
    """IExecutionContext."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.shapes, self.addresses, self.profile = engine, {}, {}, None

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        self.profile = number
        return number < len(self.engine.manifest.engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.manifest.engine.profiles[self.profile].shapes[name]
        self.shapes[name] = shape
        return len(shape) == len(low) and all(a <= b <= c for a, b, c in zip(low, shape, high))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        self.engine.device.bound.append((name, address))
        return True

    def execute_async_v3(self, stream: int) -> bool:
        device = self.engine.device
        if device.fail:
            return False
        call = (self.engine, dict(self.shapes), dict(self.addresses))
        if device.capturing is not None:
            device.capturing.append(call)
            return True
        device.plain.append(self.profile)
        compute(*call)
        return True


def compute(engine: Engine, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
    """Run the graph on memory."""
    feed = {fact.name: memory(addresses[fact.name], shapes[fact.name], fact.dtype) for fact in engine.manifest.inputs}
    names = [fact.name for fact in engine.manifest.outputs]
    for name, array in zip(names, engine.session.run(names, feed)):
        past = engine.manifest.engine.aliases.get(name)
        assert past is None or addresses[name] == addresses[past], f"{name} is not in the memory of {past}"
        memory(addresses[name], array.shape, array.dtype.name)[...] = array


def memory(address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The bytes there, as an array."""
    kind = np.dtype(dtype)
    raw = (ctypes.c_byte * (math.prod(shape) * kind.itemsize)).from_address(address)
    return np.frombuffer(raw, kind).reshape(shape)


class Engine:
    """ICudaEngine."""

    def __init__(self, graph: Path, manifest: Manifest, device: Device) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(str(graph / "model.onnx"), options,
                                                    providers=["CPUExecutionProvider"])
        self.manifest, self.device = manifest, device

    def create_execution_context(self) -> Context:
        return Context(self)


def module(device: Device, bundle: Path) -> Any:
    """The Python module of a TensorRT that opens the engine of `bundle`."""

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
            head, _, _ = data.partition(b"\n")
            if not head.startswith(b"stand-in:"):
                return None
            return Engine(Path(head.decode().removeprefix("stand-in:")), read_manifest(bundle), device)

    class Logger:
        WARNING = 2

        def __init__(self, severity: int) -> None:
            self.severity = severity

    return SimpleNamespace(Logger=Logger, Runtime=Runtime, __version__=VERSION)


def pretend_cuda(monkeypatch: Any, device: Device, capability: tuple[int, int] = (8, 9)) -> None:
    """Streams, graphs and the device of torch.cuda, on the CPU."""
    stream = SimpleNamespace(cuda_stream=7, wait_stream=lambda other: None)

    class Graph:
        def __init__(self) -> None:
            self.calls: list = []

        def replay(self) -> None:
            device.replayed += 1
            for call in self.calls:
                compute(*call)

    @contextlib.contextmanager
    def capture(graph: Graph, stream: Any) -> Any:
        device.captured += 1
        device.capturing = graph.calls
        yield
        device.capturing = None

    for name, value in (
        ("Stream", lambda on: stream), ("current_stream", lambda on: stream), ("CUDAGraph", Graph), ("graph", capture),
        ("stream", lambda which: contextlib.nullcontext()), ("device", lambda which: contextlib.nullcontext()),
        ("is_available", lambda: True), ("device_count", lambda: 1), ("get_device_name", lambda which: "Stand-in 4090"),
        ("get_device_capability", lambda which: capability),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
