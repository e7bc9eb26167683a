"""gqa_attend, the C++ plugin's launches without TensorRT: on a GPU held to the reference, elsewhere to the stand-in."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from dataclasses import astuple, replace
from pathlib import Path

import pytest
from gqa_plugins.grouped_attention import fields, launch
from gqa_plugins.grouped_attention.cubin import compile_variant
from gqa_plugins.grouped_attention.fields import Key

from .conftest import Programs
from .made_kernels import make_kernels

LAYER = launch.Layer(num_heads=8, kv_num_heads=2, scale=0.125, softcap=0.0, window=0, rotary_interleaved=0, growing=0,
                     has_rotary=0, has_sinks=0, has_new=1)
SIZES = launch.Sizes(batch=2, steps=1, capacity=512, head=64, value_head=64, dtype="fp16")
# Outputs are averages of values of size 1, rounded to fp16 (5e-4), with weights rounded to fp16 before the product.
TOLERANCE = 4e-3


def write_call(folder: Path, layer: launch.Layer, sizes: launch.Sizes, keys: tuple[Key, ...], container: bytes,
               inputs: dict) -> None:
    (folder / "layer").write_text(" ".join(map(str, (*astuple(layer), *astuple(sizes)))))
    (folder / "keys").write_bytes(fields.keys_text(keys))
    (folder / "cubins").write_bytes(container)
    for name, tensor in inputs.items():
        (folder / name).write_bytes(tensor.numpy().tobytes())


def make_inputs(layer: launch.Layer, sizes: launch.Sizes) -> dict:
    """Random tensors of one call; row 0 has a long past, row 1 a short one."""
    import torch

    chance = torch.Generator().manual_seed(20260101)

    def some(*shape: int):
        return torch.randn(shape, generator=chance).to(torch.float16)

    b, s, k = sizes.batch, sizes.steps, layer.kv_num_heads
    return {"query": some(b, s, layer.num_heads * sizes.head), "key": some(b, s, k * sizes.head),
            "value": some(b, s, k * sizes.value_head), "past_key": some(b, k, sizes.capacity, sizes.head),
            "past_value": some(b, k, sizes.capacity, sizes.value_head),
            "past_lengths": torch.tensor([400, 3], dtype=torch.int32),
            "new_lengths": torch.tensor([s, max(1, s - 1)], dtype=torch.int32)}


@pytest.mark.parametrize("repeats", [0, 3])
def test_files_reach_the_launches_and_come_back(programs: Programs, tmp_path: Path, repeats: int) -> None:
    """On the stand-in kernels do nothing: the output stays zero and the caches what they were."""
    keys, cubins, container = make_kernels(LAYER, SIZES, (89,), random.Random(20260101))
    inputs = make_inputs(LAYER, SIZES)
    write_call(tmp_path, LAYER, SIZES, keys, container, inputs)
    log = tmp_path / "log"
    said = programs.run("gqa_attend", tmp_path, str(repeats), GQA_STUB_LOG=log)
    assert (float(said) > 0) if repeats else (said == "")
    launched = [line.split()[1] for line in log.read_text().splitlines() if line.startswith("launch")]
    names = {cubins[key.sha256].kernel: cubins[key.sha256].name for key in keys}
    assert launched == [names["append"], names["decode"], names["combine"]] * (1 + repeats)
    assert (tmp_path / "output").read_bytes() == bytes(2 * 8 * 64 * 2)
    assert (tmp_path / "past_key").read_bytes() == inputs["past_key"].numpy().tobytes()


def real_gpu(programs: Programs) -> int:
    """Capability of the GPU, or a visible skip."""
    done = subprocess.run([str(programs.folder / "bin" / "gqa_attend"), "--capability"], capture_output=True, text=True,
                          env=os.environ)
    if done.returncode:
        pytest.skip(f"needs a GPU: {done.stderr.splitlines()[0]}")
    return int(done.stdout)


@pytest.mark.parametrize("steps", [1, 40], ids=["decode", "prefill"])
def test_layer_on_a_gpu_equals_the_reference(programs: Programs, tmp_path: Path, steps: int) -> None:
    import torch
    from gqa_plugins.grouped_attention import reference

    capability = real_gpu(programs)
    sizes = replace(SIZES, steps=steps)
    files = {kernel: compile_variant(variant, capability).to_bytes()
             for kernel, variant in launch.variants(LAYER, sizes).items()}
    container = fields.pack(files.values())
    keys = tuple(Key(kernel, capability, hashlib.sha256(data).hexdigest()) for kernel, data in files.items())
    inputs = make_inputs(LAYER, sizes)
    write_call(tmp_path, LAYER, sizes, keys, container, inputs)
    done = subprocess.run([str(programs.folder / "bin" / "gqa_attend"), str(tmp_path)], capture_output=True, text=True,
                          env=os.environ)
    assert done.returncode == 0, done.stderr
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    expected, key, value = reference.grouped_query_attention(
        **wide, cos=None, sin=None, sinks=None, num_heads=8, kv_num_heads=2, scale=0.125, softcap=0.0, window=0,
        rotary_interleaved=0, growing=0)

    def read(name: str, like: torch.Tensor) -> torch.Tensor:
        return torch.frombuffer(bytearray((tmp_path / name).read_bytes()), dtype=torch.float16).view(like.shape)

    assert (read("output", expected).double() - expected).abs().max() < TOLERANCE
    assert torch.equal(read("past_key", key), key.half())
    assert torch.equal(read("past_value", value), value.half())
