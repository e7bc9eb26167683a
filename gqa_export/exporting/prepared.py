"""What is known of an export before a byte is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.checkpoint import Checkpoint
from ..spec import KvCache, WindowCache
from ..weights.sources import WeightStore
from .options import ExportOptions

if TYPE_CHECKING:
    from ..bundle.quantization import Quantization
    from ..checkpoint.lora_adapter import LoraAdapter
    from ..long_attention_op import LongPlan
    from ..lowering.adapter_inputs import AdapterSlot
    from ..lowering.context import Lowered
    from ..targets import Target
    from ..trace.traced import Traced
    from .ranks import Ranks


@dataclass(frozen=True)
class Prepared:
    """Everything about an export that is known before a byte is written. Options are resolved. trace_file: of the trace
    cache, where the trace lies there. trace_taken: it was there already."""

    checkpoint: Checkpoint
    options: ExportOptions
    dtype: str
    target: Target
    traced: Traced
    trace_file: Path | None
    trace_taken: bool
    lowered: Lowered
    store: WeightStore
    adapters: tuple[LoraAdapter, ...] = ()
    slots: tuple[AdapterSlot, ...] = ()
    notes: tuple[str, ...] = ()
    """on the checkpoint: tensors that the model does not use"""
    quantization: Quantization | None = None
    """of the weights; None where all are floating-point numbers and the checkpoint's were too"""
    ranks: Ranks | None = None
    """of a model that is cut over several; `lowered` is rank 0's then"""
    kv: KvCache | None = None
    """how the cache is quantized"""
    plan: LongPlan | None = None
    prefill: Lowered | None = None
    """the graph for long prompts, where one is written"""
    importance: Mapping[str, Any] = field(default_factory=dict)
    """by what the scales of quantized weights were chosen, with a calibration text"""
    windows: WindowCache | None = None
    """layers whose cache is a ring of fewer slots than the capacity"""
    needs: str = ""
    """the first onnxruntime that runs layers which share a cache; "" where every one does"""
    largest: Mapping[str, float] = field(default_factory=dict)
    """by what the scales of rounded inputs were chosen, with the calibration text"""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is right but slower than it could be: in the graph, with the layers it concerns, and in the tracing."""
        slow = self.traced.slow_because
        return (*self.lowered.remarks, *([f"traced by torch.export, three times slower than the light capture, which "
                                          f"does not apply: {slow}"] if slow else []))


def pick_provider(provider: str, dtype: str, target: Target) -> str:
    """"cpu" or "cuda"; "auto" is CUDA where onnxruntime has it and the target's kernels there take this dtype."""
    if provider != "auto":
        return provider
    from importlib.util import find_spec

    if dtype not in target.dtypes.get("cuda", ()) or find_spec("onnxruntime") is None:
        return "cpu"
    import onnxruntime

    return "cuda" if "CUDAExecutionProvider" in onnxruntime.get_available_providers() else "cpu"
