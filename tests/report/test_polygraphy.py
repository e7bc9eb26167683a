"""PyTorch's answers as Polygraphy's files: `polygraphy run`, in a process of its own, agrees with a good bundle and
disagrees with a broken one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from refusal import refused

from gqa_export.bundle.manifest import MODEL, read_manifest
from gqa_export.cli.golden import write_golden
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.targets import get_target
from gqa_export.validation.golden_files import check_target

pytestmark = pytest.mark.whole_model


def polygraphy(command: str) -> subprocess.CompletedProcess:
    program, *arguments = command.split()
    assert program == "polygraphy"
    return subprocess.run([Path(sys.executable).with_name(program), *arguments], capture_output=True, text=True,
                          timeout=300, check=False)


@pytest.mark.parametrize(("target", "cache"), [("ort", "static"), ("portable", "growing")])
def test_polygraphy_run_agrees_with_pytorch(checkpoint, tmp_path, target, cache):
    folder = tmp_path / "bundle"
    export_onnx(checkpoint, folder, ExportOptions(target, cache=cache, capacity=128))
    done = polygraphy(write_golden(folder, str(checkpoint), tmp_path / "golden"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "PASSED" in done.stdout
    assert "logits" in done.stdout
    assert "present.1.value" in done.stdout


def test_polygraphy_run_disagrees_with_a_broken_bundle(checkpoint, bundle, tmp_path):
    folder = Path(shutil.copytree(bundle, tmp_path / "broken"))
    model = onnx.load(str(folder / MODEL), load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    next(attribute for attribute in node.attribute if attribute.name == "scale").f *= 1.05
    onnx.save(model, str(folder / MODEL))
    done = polygraphy(write_golden(folder, str(checkpoint), tmp_path / "golden"))
    assert done.returncode == 1
    assert "FAILED" in done.stdout


@pytest.mark.parametrize(("target", "dtype"), [("trt-native", "float32"), ("ort", "bfloat16")])
def test_what_polygraphy_cannot_run_this_way_is_refused(bundle, target, dtype):
    with refused("E-OPTION-POLYGRAPHY"):
        check_target(replace(read_manifest(bundle), target=target, dtype=dtype), get_target(target))
