"""What a bundle says of its TensorRT engine: the entry `engine` of `gqa_export.json`. Written by the builder, read by
every runtime, Python and C++, before it touches the engine.

An engine bundle is a folder with `model.engine`, `gqa_export.json` and the tokenizer's files. Everything else that
its manifest says (target, dtype, capacity, spec, inputs, outputs) is that of the ONNX bundle it was built from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import GqaExportError

ENGINE = "model.engine"
FLAVORS = {"tensorrt": "TensorRT", "rtx": "TensorRT for RTX"}
DECODE, PREFILL = "decode", "prefill"
REBUILD = "build the engine again with `gqa-export trt`"


@dataclass(frozen=True)
class PluginFacts:
    """The plugin that an engine's attention layers ask for: how the registry finds it, the version of the op, and
    sha256 of the kernels that the engine carries (of the container, see `gqa_plugins.grouped_attention.fields`)."""

    name: str
    version: str
    namespace: str
    contract_version: int
    sha256: str


@dataclass(frozen=True)
class ProfileFacts:
    """One optimization profile. shapes: input name -> (min, opt, max), each the whole shape."""

    name: str
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]

    def most(self, tensor: str, axis: int) -> int:
        """The largest size of an axis of an input."""
        return self.shapes[tensor][2][axis]


@dataclass(frozen=True)
class EngineFacts:
    """flavor: a key of FLAVORS. version: of the library that built it. compute_capabilities: 89 is 8.9; empty: the
    GPU it was built on. attention: "plugin" or "native". profiles: in the engine's order, which is decode (S = 1),
    prefill. aliases: output name -> the input whose memory it is. plugin_layers: nodes of the plugin in the graph.
    decomposed: TensorRT had no kernel of its own for native attention and took it apart (slower). stripped: weights
    are not inside. build: what the build log showed, for people."""

    flavor: str
    version: str
    compute_capabilities: tuple[int, ...]
    attention: str
    profiles: tuple[ProfileFacts, ...]
    aliases: dict[str, str]
    plugin: PluginFacts | None = None
    plugin_layers: int = 0
    decomposed: bool = False
    stripped: bool = False
    file: str = ENGINE
    build: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EngineFacts:
        """The inverse of dataclasses.asdict; KeyError or TypeError on data of another shape."""
        plugin = data.get("plugin")
        profiles = tuple(
            ProfileFacts(each["name"], {name: (tuple(low), tuple(usual), tuple(high))
                                        for name, (low, usual, high) in each["shapes"].items()})
            for each in data["profiles"])
        return cls(**{**data, "plugin": PluginFacts(**plugin) if plugin else None, "profiles": profiles,
                      "compute_capabilities": tuple(data["compute_capabilities"])})

    def profile(self, name: str) -> tuple[int, ProfileFacts]:
        """Number and facts of a profile; GqaExportError if there is none of that name."""
        for number, profile in enumerate(self.profiles):
            if profile.name == name:
                return number, profile
        raise GqaExportError(f"the engine has no {name} profile", "gqa_export.json", REBUILD)

    @property
    def max_batch(self) -> int:
        """Sequences that the engine takes at once."""
        return min(profile.most("input_ids", 0) for profile in self.profiles)

    @property
    def max_prompt(self) -> int:
        """New tokens that the engine takes at once."""
        return self.profile(PREFILL)[1].most("input_ids", 1)
