"""The messages between the parent and the building process: plain data as JSON.

Messages of the child, one JSON object a line on its standard output: {"progress": [text, done, total]}, and at the
end either {"built": {...}} or {"refused": [what, where, fix, code]}.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

SEE_LOG = "read TensorRT's messages above; `gqa-export inspect` shows the bundle"
"""the fix of a refusal that is TensorRT's own: its last lines are to be shown with it"""
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class KernelFiles:
    """The plugin's kernels: variant's name -> capability (as text, for JSON) -> sha256; the container's file."""

    keys: dict[str, dict[str, str]]
    container: str


@dataclass(frozen=True)
class Job:
    """One build. module: what is imported as TensorRT, known to others as `canonical`. capabilities: 89 is 8.9; empty
    is the GPU at hand. profiles: (name, shapes). workspace_bytes 0: TensorRT's default. decomposable: native attention
    may be taken apart."""

    flavor: str
    module: str
    canonical: str
    model: str
    engine: str
    capabilities: tuple[int, ...]
    profiles: tuple[tuple[str, Shapes], ...]
    kernels: KernelFiles | None = None
    timing_cache: str = ""
    strip_weights: bool = False
    workspace_bytes: int = 0
    decomposable: bool = False

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The inverse."""
        data = json.loads(text)
        kernels = data.pop("kernels")
        data["profiles"] = tuple((name, shapes) for name, shapes in data["profiles"])
        return cls(**{**data, "capabilities": tuple(data["capabilities"])},
                   kernels=KernelFiles(**kernels) if kernels else None)


@dataclass(frozen=True)
class Tensor:
    """An input or output of the network: TensorRT's name of its type; -1 in the shape is dynamic."""

    name: str
    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Built:
    """The child's result. aliases: output -> input whose memory it is, by the plugin (or, for TensorRT's own cache
    update, by the network). containers: how often the engine carries the plugin's kernels."""

    version: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    aliases: dict[str, str]
    plugin_layers: int
    attention_layers: int
    containers: int
    seconds: float

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Built:
        """From the child's message."""
        for name in ("inputs", "outputs"):
            data[name] = tuple(Tensor(one["name"], one["type"], tuple(one["shape"])) for one in data[name])
        return cls(**data)
