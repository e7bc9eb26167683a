"""The options of a lowering, what its passes share, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from .. import graph_io
from ..graph.passes import NearMiss, PassLog
from ..long_attention_op import LongPlan
from ..spec import AttentionSpec, Fallback, KvCache, ModelSpec, WindowCache
from ..targets import Target, by_reason

if TYPE_CHECKING:
    import onnx

    from ..quantized.facts import Form, MatrixFacts
    from ..quantized.input_codes import InputCodes
    from .rotary.verify import Rotation


@dataclass(frozen=True)
class LowerOptions:
    """What the caller wants.

    Attributes:
        target: a name of `gqa_export.targets`.
        cache: "growing" or "static".
        capacity: tokens of a static cache, and rows of rotary tables in both modes.
        logits: "all" or "last".
        provider: where the graph is to run, "cpu" or "cuda".
        packed: weights are copied, so matrices may be joined; False where they are used as stored.
        runtime_ops: operators of `Target.state_ops` that the installed runtime has; None where that is not known: those
            that every version has which this package takes.
        quantized: facts of the weights that are quantized, by name; a plain model has none.
        exact: quantized products do not round their inputs to int8 (accuracy level 0 of ONNX Runtime).
        inputs: name of a quantized weight -> how products with it round their inputs to its type; others do not.
        kv: how the cache is quantized; None: it is not.
        windows: layers whose static cache is a ring of fewer slots; None: no layer's is.
    """

    target: str
    cache: str = "growing"
    capacity: int = 4096
    logits: str = "all"
    provider: str = "cpu"
    packed: bool = True
    runtime_ops: frozenset[str] | None = None
    quantized: Mapping[str, MatrixFacts] = field(default_factory=dict)
    exact: bool = False
    inputs: Mapping[str, InputCodes] = field(default_factory=dict)
    kv: KvCache | None = None
    windows: WindowCache | None = None
    hidden: bool = False
    """the last hidden states are an output too"""
    ragged_chunks: bool = False
    """attention is given each row's number of new tokens (`Target.ragged_chunks_need`)"""
    reads_caches: bool = True
    """a layer without a cache reads its owner's present and adds nothing (`Target.shared_caches_need`); where the
    runtime's operator cannot, it reads its owner's past, adds what its owner adds and drops the copy"""
    long: LongPlan | None = None
    """layers that become the op for long prompts; None in the graph that is exact"""


@dataclass(frozen=True)
class Held:
    """How the graph holds a quantized weight.

    Attributes:
        forms: one for each operator that reads it; () where it is floating-point numbers.
        parts: recipe name of a part -> its form and part.
        reason: why it is floating-point numbers, or not as it is stored.
        inputs: how products with it round their inputs; None: they do not.
    """

    forms: tuple[Form, ...] = ()
    parts: Mapping[str, tuple[Form, str]] = field(default_factory=dict)
    reason: str = ""
    inputs: InputCodes | None = None


@dataclass(frozen=True)
class Lowered:
    """What a lowering gives.

    Attributes:
        model: in its dialect, weights still recipes.
        fallbacks: layers that the target's attention op cannot hold.
        counts: what each pass rewrote.
        remarks: one line for each thing that is right but not as fast as it could be, with the layers it concerns.
        near_misses: places that nearly fitted the pattern of a pass and were left as they were.
        held: how each weight of `LowerOptions.quantized` is held.
    """

    model: onnx.ModelProto
    fallbacks: tuple[Fallback, ...]
    counts: dict[str, int]
    remarks: tuple[str, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
    held: Mapping[str, Held] = field(default_factory=dict)


@dataclass
class Context:
    """What the passes share.

    Attributes:
        model: the canonical ModelProto.
        log: what each pass did.
        remarks: a layer's number and what is right there but not as fast as it could be.
        rotations: per layer, the rotation that a pass moved into the attention op.
        held: how quantized weights are held, as passes find out.
        quantized: facts of what products read quantized: those of the options, an expert of a stack as a matrix.
    """

    spec: ModelSpec
    target: Target
    options: LowerOptions
    model: onnx.ModelProto
    fallbacks: list[Fallback] = field(default_factory=list)
    log: PassLog = field(default_factory=PassLog)
    remarks: list[tuple[int, str]] = field(default_factory=list)
    rotations: dict[int, Rotation] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)
    quantized: dict[str, MatrixFacts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin with what the options name."""
        self.quantized.update(self.options.quantized)

    @cached_property
    def element(self) -> int:
        """ONNX's number of the model's float type."""
        return next(value.type.tensor_type.elem_type for value in self.model.graph.output
                    if value.name == graph_io.LOGITS)

    def is_long(self, layer: AttentionSpec) -> bool:
        """Whether a layer becomes the op for long prompts."""
        return self.options.long is not None and layer.layer in self.options.long.layers

    def cannot_hold(self, layer: AttentionSpec) -> list[str]:
        """Every reason why a layer does not become the target's attention op; [] if it does."""
        replaced = self.is_long(layer) and not self.target.long_inside
        return [*self.target.cannot_hold(layer), *(["it is approximated"] if replaced else [])]

    def fall_back(self, layer: AttentionSpec) -> bool:
        """Whether a layer does not become the target's attention op; where the op cannot hold it, this is recorded,
        with every reason."""
        if self.is_long(layer):
            return True
        reasons = self.target.cannot_hold(layer)
        if reasons:
            self.fallbacks.append(Fallback(layer.layer, self.target.attention, self.target.fallback,
                                           "; ".join(reasons)))
        return bool(reasons)

    def fused_state_op(self, name: str) -> str:
        """The operator that a state op becomes on this target; "" where it becomes its body in standard operators: the
        target has no operator for it, or the installed runtime does not."""
        op = self.target.state_ops.get(name, "")
        known = self.target.state_ops_since_first if self.options.runtime_ops is None else self.options.runtime_ops
        return op if op in known else ""

    def result(self, model: onnx.ModelProto) -> Lowered:
        """What the lowering gives, with the model as it came out."""
        return Lowered(model, tuple(self.fallbacks), self.log.counts, tuple(by_reason(self.remarks)),
                       tuple(self.log.near_misses), dict(self.held))
