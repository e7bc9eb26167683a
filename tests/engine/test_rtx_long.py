"""Engines with approximate attention, built by TensorRT for RTX: the plugin's version 2."""

from __future__ import annotations

import pytest
from gqa_models import write_tiny
from gqa_plugins.grouped_attention import fields, long_launch

from gqa_export.bundle.engine_facts import ENGINE
from gqa_export.bundle.integrity import check_files
from gqa_export.bundle.long_facts import PREFILL
from gqa_export.exporting.long_plan import LongOptions
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx

from .built import build, check

pytestmark = [pytest.mark.whole_model, pytest.mark.slow]
OPTIONS = {"tiles": LongOptions("tiles", "last:1", leaf=16, heavy=16, samples=8, anchors=3),
           "hyper": LongOptions("hyper", "last:1", leaf=16, heavy=8, samples=8, anchors=3)}


@pytest.mark.parametrize(("method", "capability"), [("tiles", 80), ("hyper", 120)])
def test_an_engine_whose_second_layer_approximates(rtx, tmp_path, method: str, capability: int) -> None:
    checkpoint, bundle = write_tiny("llama", tmp_path / "checkpoint", num_hidden_layers=2), tmp_path / "bundle"
    export_onnx(checkpoint, bundle, ExportOptions(target="trt-plugin", dtype="fp16", capacity=64,
                                                  long=OPTIONS[method]))
    built = build(bundle, tmp_path / "engine", (capability,))
    check(built, bundle, "plugin", (capability,))
    facts, data = built.facts, (built.folder / ENGINE).read_bytes()
    assert (facts.plugin.version, facts.plugin_layers) == ("2", 2)
    assert data.count(fields.MAGIC + b"\n") == 1
    start = data.index(fields.MAGIC + b"\n")
    files = fields.unpack(data[start: start + facts.build["kernel_bytes"]])
    kernels = [file.split(b"\n")[1].partition(b" ")[2].decode() for file in files.values()]
    wanted = ("append", "prefill", "decode", "combine", *long_launch.KERNELS)
    assert sorted(kernels) == sorted(wanted)
    named = dict(fields.SERIALIZED_OF["2"])
    assert all(name.encode() in data for name in named), "the engine's fields carry the attributes"
    for sha256, file in files.items():
        profiles = 2 if file.split(b"\n")[1].partition(b" ")[2].decode() in long_launch.KERNELS else 4
        assert data.count(sha256.encode()) >= 1 + profiles, "every layer of both profiles names its kernels"
    assert built.manifest.long is not None
    assert not (built.folder / PREFILL).exists()
    check_files(built.folder, built.manifest)
