"""Every fact of every target, one frozen row each. Code asks `target.shares_buffer`, never for a target's name.

Source of the facts: onnxruntime docs/ContribOperators.md and trials with ONNX Runtime 1.31.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import GqaExportError


@dataclass(frozen=True)
class Target:
    """runs_in_onnxruntime: `OrtSession` can run it. shares_buffer: with a static cache, past and present may be the
    same memory. chunks_alone: several new tokens over a past only at batch 1. empty_alone: no sequence of a batch
    may bring zero new tokens."""

    name: str
    runs_in_onnxruntime: bool = True
    shares_buffer: bool = False
    chunks_alone: bool = False
    empty_alone: bool = False


TARGETS: tuple[Target, ...] = (
    Target("ort", shares_buffer=True, chunks_alone=True, empty_alone=True),
    Target("onnx"),
    Target("portable"),
)


def get_target(name: str) -> Target:
    """The row of a target, or a GqaExportError that lists them."""
    for target in TARGETS:
        if target.name == name:
            return target
    raise GqaExportError(f"unknown target {name!r}", "--target", f"one of {', '.join(t.name for t in TARGETS)}")
