"""libgqa_plugin.so in the real TensorRT for RTX: loaded by the registry, found by the parser, built into an engine.

Needs TensorRT's headers (to compile it) and TensorRT for RTX; no GPU.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from gqa_plugins.grouped_attention import fields
from gqa_plugins.grouped_attention.launch import Layer, Sizes

from gqa_export.environment import tensorrt_libraries

from . import rtx_child
from .conftest import Programs
from .made_kernels import make_kernels


@pytest.fixture
def rtx() -> tensorrt_libraries.Library:
    if not tensorrt_libraries.is_there("rtx"):
        pytest.skip("TensorRT for RTX is not installed: pip install 'gqa-export[rtx]'")
    return tensorrt_libraries.find("rtx")


def build(library: tensorrt_libraries.Library, plugin: Path, engine: Path,
          **environment: str) -> subprocess.CompletedProcess:
    with tensorrt_libraries.visible(library) as base:
        return subprocess.run([sys.executable, rtx_child.__file__, library.module, str(plugin), str(engine)], text=True,
                              capture_output=True, timeout=300, env={**base, **environment})


def test_engine_builds_with_the_cpp_plugin_and_carries_its_kernels(tensorrt_programs: Programs,
                                                                   rtx: tensorrt_libraries.Library,
                                                                   tmp_path: Path) -> None:
    chance = random.Random(20260101)
    folder = tmp_path / "kernels"
    folder.mkdir()
    sizes = Sizes(1, 1, rtx_child.CAPACITY, rtx_child.HEAD, rtx_child.HEAD, "fp16")
    keys, files = [], {}
    for window in (0, 8):
        layer = Layer(rtx_child.HEADS, rtx_child.KV_HEADS, rtx_child.HEAD ** -0.5, 0.0, window, 0, 0, 0, 0, 1)
        made, _, container = make_kernels(layer, sizes, (89,), chance)
        keys.append({key.kernel: key for key in made})
        files |= fields.unpack(container)
    for sha, data in files.items():
        (folder / f"{sha}.gqacubin").write_bytes(data)
    engine = tmp_path / "engine"
    done = build(rtx, tensorrt_programs.plugin_library, engine, GQA_KERNELS=str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "layers 2\n"
    data = engine.read_bytes()
    # Fields are stored once per profile: of two layers, one carries the kernels.
    assert data.count(fields.pack(files.values())) == 2
    for kernel in ("decode", "prefill"):
        for of_layer in keys:
            key = of_layer[kernel]
            assert data.count(f"{key.kernel} {key.capability} {key.sha256}\n".encode()) == 2


def test_build_without_kernels_fails_with_the_plugins_words(tensorrt_programs: Programs,
                                                            rtx: tensorrt_libraries.Library, tmp_path: Path) -> None:
    done = build(rtx, tensorrt_programs.plugin_library, tmp_path / "engine", GQA_KERNELS=str(tmp_path / "nowhere"))
    assert done.returncode != 0
    assert "GQA_KERNELS names no folder" in done.stdout + done.stderr
    assert not (tmp_path / "engine").exists()
