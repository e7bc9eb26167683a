"""One layer of the TensorRT plugin without TensorRT: its fields, its kernels' keys, the shapes it takes.

Dimensions as in `gqa_export.attention_op`; fields as in `fields`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gqa_plugins.grouped_attention import fields, launch
from gqa_plugins.grouped_attention.fields import Key
from gqa_plugins.grouped_attention.launch import Layer, Sizes
from gqa_plugins.grouped_attention.layers import LAYERS
from gqa_plugins.grouped_attention.long_launch import problem

from gqa_export.errors import InvalidBundle


@dataclass(frozen=True)
class Kernels:
    """What was compiled for an engine: a variant's name -> capability -> sha256, and the container of the files."""

    keys: Mapping[str, Mapping[int, str]]
    container: bytes = field(repr=False)

    def of(self, layer: Layer, sizes: Sizes) -> tuple[Key, ...]:
        """The keys of a layer. Raises GqaExportError if a kernel that it needs was not compiled."""
        found = []
        for kernel, variant in launch.variants(layer, sizes).items():
            if variant.name not in self.keys:
                raise InvalidBundle(f"kernel {variant.name} was not compiled for this engine", "Kernels.keys",
                                    "report it: the attention layers of the graph and of its manifest differ",
                                     code="E-ENGINE-KERNEL-MISSING")
            found += [Key(kernel, capability, sha) for capability, sha in self.keys[variant.name].items()]
        return tuple(sorted(found))


@dataclass(frozen=True)
class State:
    """One layer. keys: empty until the sizes are known (building). container: the kernels it carries, b"" if none."""

    layer: Layer
    building: bool
    keys: tuple[Key, ...] = ()
    container: bytes = field(default=b"", repr=False)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the node's inputs, in order."""
        return fields.node_inputs(asdict(self.layer))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the node's outputs, in order."""
        return fields.node_outputs(asdict(self.layer))

    def sizes(self, dims: Sequence[Sequence[int]], dtype: str) -> Sizes:
        """From the shapes of the inputs, in order."""
        return Sizes.from_shapes({name: tuple(shape) for name, shape in zip(self.inputs, dims, strict=True)}, dtype)

    def to_fields(self) -> list[tuple[str, str, Any]]:
        """(name, kind, value) of every serialized field, in order; `cubins` only if this layer carries them."""
        values = self.to_fields_by_name()
        return [(name, kind, values[name]) for name, kind in fields.SERIALIZED_OF[self.layer.version] if name in values]

    def to_fields_by_name(self) -> dict[str, Any]:
        """name -> value of the same."""
        carried = {"cubins": self.container} if self.container else {}
        return {**asdict(self.layer), "contract_version": fields.CONTRACT_OF[self.layer.version],
                "keys": fields.keys_text(self.keys), **carried}

    @classmethod
    def from_fields(cls, values: Mapping[str, Any], where: str, version: str = fields.PLUGIN_VERSION) -> State:
        """A restored layer of a version of the plugin. Its container goes into the process's store, and with it into an
        engine that is serialized again."""
        left = dict(values)
        missing = [name for name, _ in fields.SERIALIZED_ONLY if name not in left and name not in fields.OPTIONAL]
        if missing:
            raise InvalidBundle(f"the attention layer lacks {', '.join(missing)}", where, fields.REBUILD,
                                 code="E-ENGINE-LAYER-FIELDS")
        fields.check_contract_version(int(left.pop("contract_version")), where, version)
        keys = fields.parse_keys(left.pop("keys"), where)
        container = left.pop("cubins", b"")
        if "cubins" in values:
            fields.STORE.add(container)
        return cls(LAYERS[version].from_fields(left, where), building=False, keys=keys, container=container)


@dataclass
class Carrying:
    """Whether a layer, as it is for one profile, carries the engine's kernels. None: not decided yet."""

    decided: bool | None = None


class Carriers:
    """Chooses the layer that carries the kernels of an engine: the first to be serialized since one was configured.

    TensorRT configures the layers of a network and then serializes them, on one thread. Nothing else tells two networks
    in a process apart: neither are names their own, nor does a plugin learn which network it is in. A build on another
    thread can make this one carry twice, which costs bytes, never make it carry nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._configured = 0
        self._carried: dict[int, int] = {}

    def configure(self, layer: Carrying) -> None:
        """A build of this layer's network goes on: what was decided in an earlier one is void."""
        with self._lock:
            self._configured += 1
            layer.decided = None

    def carries(self, layer: Carrying) -> bool:
        """Whether this layer is the one. The same answer until it is configured again: TensorRT reads the fields twice,
        for their size and for their content."""
        with self._lock:
            if layer.decided is None:
                thread = threading.get_ident()
                layer.decided = self._carried.get(thread) != self._configured
                self._carried[thread] = self._configured
            return layer.decided


RANKS = {"query": 3, "key": 3, "value": 3, "past_key": 4, "past_value": 4, "past_lengths": 1, "new_lengths": 1,
         "cos": 2, "sin": 2, "sinks": 1, "fractions": 2, "projections": 2, "code_order": 1}
EXPORT_AGAIN = "export the bundle again: `gqa-export onnx --target trt-plugin`"


def check_shapes(state: State, dims: Sequence[Sequence[int]]) -> None:
    """Refuse a node whose inputs do not belong together. dims: their shapes, in order."""
    shapes = dict(zip(state.inputs, dims, strict=True))
    wrong = [f"{name} has {len(shape)} dimensions, expected {RANKS[name]}" for name, shape in shapes.items()
             if len(shape) != RANKS[name]]
    if wrong:
        raise InvalidBundle("; ".join(wrong), "attention layer", EXPORT_AGAIN, code="E-ENGINE-LAYER-SHAPES")
    heads, kv_heads = state.layer.num_heads, state.layer.kv_num_heads
    _, found_heads, _, head = shapes["past_key"]
    value_head = shapes["past_value"][3]
    features = {"query": heads * head, "key": kv_heads * head, "value": kv_heads * value_head}
    wrong = [f"{name} has {shapes[name][2]} features, expected {size}" for name, size in features.items()
             if name in shapes and shapes[name][2] != size]
    if found_heads != kv_heads:
        wrong.append(f"past_key has {found_heads} heads, expected {kv_heads}")
    if state.layer.ring and shapes["past_key"][2] < state.layer.window:
        wrong.append(f"a ring of {shapes['past_key'][2]} slots cannot hold a window of {state.layer.window}")
    if state.layer.long is not None:
        bits = shapes["projections"][1]
        tables = {"fractions": (kv_heads, state.layer.long.samples), "projections": (head, bits),
                  "code_order": (1 << bits,)}
        wrong += [f"{name} is {list(shapes[name])}, expected {list(size)}" for name, size in tables.items()
                  if tuple(shapes[name]) != size]
        unheld = problem(state.layer.long, shapes["past_key"][2], bits)
        wrong += [unheld] if unheld else []
    if wrong:
        raise InvalidBundle("; ".join(wrong), "attention layer", EXPORT_AGAIN, code="E-ENGINE-LAYER-SHAPES")
