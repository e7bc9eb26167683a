"""Random blocks of every type of ggml that is kept quantized: bytes that are a valid tensor, with finite scales."""

from __future__ import annotations

import numpy as np

HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
          "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": ()}
"""where the half-precision scales of a block are; random bytes there would be infinite now and then"""


def stored_rows(name: str, size: int, rows: int = 3, blocks: int = 2, seed: int = 7) -> np.ndarray:
    """Random blocks of a type, of finite scales of both signs."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows * blocks, size), np.uint8)
    for at in HALVES[name]:
        raw[:, at : at + 2] = rng.normal(0, .1, (len(raw), 1)).astype(np.float16).view(np.uint8)
    if name == "MXFP4":
        raw[:, 0] = rng.integers(0, 200, len(raw))
    return raw.reshape(rows, blocks * size)
