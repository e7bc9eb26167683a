"""A bundle's facts of its TensorRT engine: the entry `engine` of `gqa_export.json`. Written by the builder, read by
every runtime, Python and C++, before it touches the engine.

An engine bundle is a folder with `model.engine`, `gqa_export.json` and the tokenizer's files. The rest of its
manifest (target, dtype, capacity, spec, inputs, outputs) is that of the ONNX bundle it was built from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from ..errors import InvalidBundle
from ..spec import FAIL_FAST, STRICT, Count, Layer, Limits, Text

ENGINE = "model.engine"
FLAVORS = {"tensorrt": "TensorRT", "rtx": "TensorRT for RTX"}
DECODE, PREFILL = "decode", "prefill"
REBUILD = "build the engine again with `gqa-export trt`"
MOST_PROFILES = 16
Capability = Annotated[int, Limits(ge=1, le=10_000)]
Shape = Annotated[tuple[Count, ...], Limits(max_length=8, fail_fast=True)]


@dataclass(frozen=True)
class PluginFacts:
    """The plugin that an engine's attention layers ask for: how the registry finds it, the version of the op, and
    sha256 of the kernels that the engine carries (of the container, see `gqa_plugins.grouped_attention.fields`)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: Text
    version: Text
    namespace: Text
    contract_version: Count
    sha256: Text


@dataclass(frozen=True)
class ProfileFacts:
    """One optimization profile. shapes: input name -> (min, opt, max), each the whole shape."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: Text
    shapes: Annotated[dict[Text, tuple[Shape, Shape, Shape]], FAIL_FAST]

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

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    flavor: Text
    version: Text
    compute_capabilities: Annotated[tuple[Capability, ...], Limits(max_length=64, fail_fast=True)]
    attention: Text
    profiles: Annotated[tuple[ProfileFacts, ...], Limits(max_length=MOST_PROFILES, fail_fast=True)]
    aliases: Annotated[dict[Text, Text], FAIL_FAST]
    plugin: PluginFacts | None = None
    plugin_layers: Layer = 0
    decomposed: bool = False
    stripped: bool = False
    file: Text = ENGINE
    build: dict[str, Any] = field(default_factory=dict)

    def profile(self, name: str) -> tuple[int, ProfileFacts]:
        """Number and facts of a profile. InvalidBundle where the engine has none of that name."""
        for number, profile in enumerate(self.profiles):
            if profile.name == name:
                return number, profile
        raise InvalidBundle(f"the engine has no {name} profile", "gqa_export.json", REBUILD, code="E-BUNDLE-PROFILE")

    @property
    def max_batch(self) -> int:
        """Sequences that the engine takes at once."""
        return min(profile.most("input_ids", 0) for profile in self.profiles)

    @property
    def max_prompt(self) -> int:
        """New tokens that the engine takes at once."""
        return self.profile(PREFILL)[1].most("input_ids", 1)
