"""What a manifest says of the graph for long prompts, which lies beside the exact one on the same weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from ..long_attention_op import LongPlan
from ..spec import STRICT, AttentionSpec, Limits

PREFILL = "prefill.onnx"
LONG_PLUGIN_VERSION = "2"
"""of the TensorRT plugin, of whose nodes that graph is made for target `trt-plugin`"""


@dataclass(frozen=True)
class LongFacts:
    """The graph `prefill.onnx`: its plan, and the sha256 of the tables that take the place of random numbers."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    plan: LongPlan
    tables_sha256: Annotated[str, Limits(pattern="^[0-9a-f]{64}$")]

    def problem(self, layers: tuple[AttentionSpec, ...], capacity: int) -> str:
        """What is wrong with it in a bundle of these layers; "" where nothing is."""
        wrong = self.plan.problems(layers, capacity)
        if not wrong and self.plan.digest(layers) != self.tables_sha256:
            wrong = ["tables_sha256 is not that of the tables which the seed gives"]
        return f"long: {wrong[0]}" if wrong else ""
