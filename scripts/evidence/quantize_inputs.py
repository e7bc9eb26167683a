"""SmolLM2 quantized to FP8 for TensorRT, weights alone and with products' inputs (W8A8), and how far PyTorch's own
rounding moves logits. The graphs are run by ONNX Runtime on a CPU, in fp32: no engine is. NVFP4 is not among them: ONNX
Runtime has no FP4, and the standard operators that stand for it are slow on texts of thousands of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from gqa_export.compare.case_verdict import SHIPPED

RECIPES: dict[str, tuple[str, ...]] = {
    "fp8": ("--quantize", "fp8"), "fp8, inputs too": ("--quantize", "fp8", "--activations", "same")}
DRAWS = (1, 2, 3, 4)
"""seeds of PyTorch's rounding errors, besides the one that it has by itself"""


def command(name: str, checkpoint: Path, calibration: Path, folder: Path, room: int) -> list[str]:
    """The export of a recipe into a folder: arguments of `gqa-export`. Every row is calibrated, so that those with
    inputs and without differ in these alone."""
    return ["onnx", str(checkpoint), "-o", str(folder), "--no-validate", "--target", "trt-native", "--dtype", "fp16",
            "--capacity", str(room), "--calibrate", str(calibration), *RECIPES[name]]


def judged(folder: Path, checkpoint: Path, calibration: Path, text: Path) -> dict[str, Any]:
    """Both verdicts on a bundle, and what it lost."""
    from gqa_export.validation.loss import LossRequest
    from gqa_export.validation.validate import validate

    found = validate(folder, checkpoint, steps=1, as_dtype="fp32", loss=LossRequest(
        reference=checkpoint, text=text, calibrate=calibration))
    loss = found.loss
    if loss is None:
        raise SystemExit(f"{folder}: no loss was measured")
    return {"exact": found.export_exact, "shipped": found.as_shipped, "passed": found.passed,
            "ranged": {case.name: list(case.ranged) for case in found.cases if case.ranged},
            "kl_mean": loss.kl_mean, "kl_p99": loss.kl_p99, "top1": loss.top1,
            "perplexity_increase": loss.perplexity_increase}


def own_errors(validated: Callable[[], Any]) -> dict[str, float]:
    """By how much PyTorch's logits in the bundle's number format differ from fp64 in each case: the largest of its own
    and of the draws. validated: compares a bundle."""
    with patch("gqa_export.validation.run_cases.doubtful", lambda log, dtype, part: part != SHIPPED), \
            patch("gqa_export.validation.run_cases.REDRAWS", DRAWS):
        report = validated()
    return {case.name: kind.same_dtype_baseline for case in report.cases if not case.name.startswith("shipped ")
            for kind in case.kinds if kind.kind == "logits"}
