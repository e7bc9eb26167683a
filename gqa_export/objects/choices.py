"""The closed sets that options of the public API come from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Target = Literal["ort", "onnx", "portable", "trt-plugin", "trt-native"]
Dtype = Literal["auto", "fp32", "fp16", "bf16"]
Cache = Literal["growing", "static"]
Weights = Literal["copy", "link", "inplace"]
Logits = Literal["all", "last"]
Provider = Literal["auto", "cpu", "cuda"]
Level = Literal["quick", "full"]
Flavor = Literal["auto", "tensorrt", "rtx"]
Attention = Literal["plugin", "native"]
Method = Literal["mean", "first", "random", "svd", "calibrated"]
Grouping = Literal["contiguous", "similarity"]
Place = str | Path
"""a file or folder"""
