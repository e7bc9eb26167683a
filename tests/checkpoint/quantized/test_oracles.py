"""The readers against libraries: the committed comparison is of the readers as they are, and transformers' own here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import quantized_oracles
import torch

from gqa_export.checkpoint.open import open_checkpoint

from .test_experts import write_gpt_oss

ALLOWED = {"torch.float32": 3e-7, "torch.bfloat16": 2**-8, "torch.float16": 2**-11}
"""the most that the largest of all values may be off, by the type in which the library computes"""


@pytest.mark.parametrize("library", quantized_oracles.LIBRARIES)
def test_the_committed_comparison_is_of_the_readers_as_they_are(library: str) -> None:
    found = json.loads(quantized_oracles.OUTPUT.read_text(encoding="utf-8"))["libraries"][library]
    assert found["reader"] == quantized_oracles.digest(quantized_oracles.LIBRARIES[library]), \
        "run scripts/quantized_oracles.py again"
    assert found["cases"]
    for case in found["cases"]:
        assert case["largest difference"] <= ALLOWED[case["library computes in"]], case


def test_transformers_reads_mxfp4_alike(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    write_gpt_oss(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name, matrix in open_checkpoint(tmp_path).quantized.items():
        theirs = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"], dtype=torch.float32)
        np.testing.assert_array_equal(matrix.parameter().astype(np.float32), theirs.numpy())
