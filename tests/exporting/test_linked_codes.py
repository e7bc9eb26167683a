"""`--weights link` of a quantized checkpoint: codes whose stored bytes are the operator's are used where they lie."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from checkpoint.quantized import test_compressed_tensors as compressed
from checkpoint.quantized import test_other_formats as others
from quantized_checkpoints import write_quantized

from exporting.test_kept import logits
from gqa_export.describe.inspection import stored_in_graph
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import Export, export_onnx
from gqa_export.validation.validate import validate

FORMATS: dict[str, tuple[dict[str, Any], Any]] = {
    "compressed-tensors, 4 bits": (compressed.entry("pack-quantized", num_bits=4, group_size=32),
                                   compressed.packed(4, 32)),
    "compressed-tensors, 8 bits": (compressed.entry("pack-quantized", num_bits=8, group_size=32),
                                   compressed.packed(8, 32)),
    "compressed-tensors, scales of float16": (compressed.entry("pack-quantized", num_bits=4, group_size=32),
                                              compressed.packed(4, 32, dtype=torch.float16)),
    "bitsandbytes nf4": (others.BNB, others.bnb()),
    "Olive, scales of float16": others.olive(4, True, torch.float16),
}


def codes_of(folder: Path) -> dict[str, tuple[str, int]]:
    """Where the graph's codes are: initializer -> file and bytes."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    found = {}
    for tensor in model.graph.initializer:
        if ".codes" in tensor.name:
            place = {entry.key: entry.value for entry in tensor.external_data}
            found[tensor.name] = (place["location"], int(place["length"]))
    return found


def export(source: Path, folder: Path, weights: Any, **options: Any) -> Export:
    return export_onnx(source, folder, ExportOptions(dtype="fp32", capacity=32, weights=weights, activations="exact",
                                                     **options))


@pytest.mark.parametrize("form", FORMATS)
def test_codes_are_linked_and_not_copied(form: str, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    write_quantized(source, *FORMATS[form], intermediate_size=128)
    linked, copied = (export(source, tmp_path / mode, mode) for mode in ("link", "copy"))
    codes = codes_of(linked.folder)
    assert codes
    assert {file for file, _ in codes.values()} == {"model.safetensors"}
    assert {file for file, _ in codes_of(copied.folder).values()} == {"model.onnx.data"}
    # no byte of codes is written: the file of what is copied is smaller by all of them, and more
    size = sum(length for _, length in codes.values())
    data = linked.folder / "model.onnx.data"
    written = data.stat().st_size if data.exists() else 0
    assert linked.manifest.bytes_copied <= written
    assert written <= (copied.folder / "model.onnx.data").stat().st_size - size
    assert linked.manifest.bytes_linked >= size
    assert os.path.samefile(linked.folder / "model.safetensors", source / "model.safetensors")
    assert "model.safetensors" in linked.manifest.files
    # the same numbers, through graphs that differ in whether query, key and value are one product
    got, wanted = logits(linked.folder), logits(copied.folder)
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert validate(linked.folder, source, steps=2).passed
    assert stored_in_graph(linked.folder)[1] == stored_in_graph(copied.folder)[1]


@pytest.mark.parametrize("form", ["asymmetric", "in order of importance"])
def test_codes_of_another_layout_are_packed(form: str, tmp_path: Path) -> None:
    """Zero points are packed along other axes, and columns sorted: then a part is copied, and right."""
    zeros = form == "asymmetric"
    source = tmp_path / "checkpoint"
    write_quantized(source, compressed.entry("pack-quantized", num_bits=4, group_size=32, symmetric=not zeros),
                    compressed.packed(4, 32, zeros=zeros, order=not zeros), intermediate_size=128)
    linked, copied = (export(source, tmp_path / mode, mode) for mode in ("link", "copy"))
    got, wanted = logits(linked.folder), logits(copied.folder)
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_targets_with_another_layout_pack_their_codes(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    write_quantized(source, *FORMATS["compressed-tensors, 4 bits"], intermediate_size=128)
    done = export(source, tmp_path / "link", "link", target="onnx")
    assert {file for file, _ in codes_of(done.folder).values()} == {"model.onnx.data"}
