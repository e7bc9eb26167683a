"""What a quantized cache costs and gains: the attention step beside a cache of fp32, and the loss on a real model.

    python scripts/benchmark_kv_cache.py --checkpoint MODEL.gguf --text TEXT

The step is one GroupQueryAttention node of ONNX Runtime, one thread, past and present in one buffer, 32 query heads
over 8 key/value heads of 128; CPU time, so that what else the machine does counts little. The loss is that of
`gqa-export validate --reference` with weights as the checkpoint has them, so that the cache alone is quantized. The
calibration text is the second half of TEXT, the loss is measured on the beginning of the first.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import click
import numpy as np
from onnx import TensorProto, helper, numpy_helper

import gqa_export as gqa

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "benchmarks"
HEADS, KV_HEADS, SIZE = 32, 8, 128
LENGTHS = (1024, 8192)
REPEAT = 40
MEASURED = ("int8",)
"""whose loss is measured"""
ELEMENTS = {"fp32": (TensorProto.FLOAT, np.float32, 1), "int8": (TensorProto.INT8, np.int8, 1),
            "int4": (TensorProto.UINT8, np.uint8, 2)}


def model(kind: str, capacity: int) -> bytes:
    """One attention node with a cache of this kind."""
    element, _, parts = ELEMENTS[kind]
    names, attributes, scales = ["q", "k", "v", "pk", "pv", "lengths", "total"], {}, []
    if kind != "fp32":
        names += [""] * 5 + ["ks", "vs"]
        attributes = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": int(kind[3:])}
        scales = [numpy_helper.from_array(np.array([0.03], np.float32), name) for name in ("ks", "vs")]
    node = helper.make_node("GroupQueryAttention", names, ["out", "nk", "nv"], domain="com.microsoft", num_heads=HEADS,
                            kv_num_heads=KV_HEADS, **attributes)
    cache = [1, KV_HEADS, capacity, SIZE // parts]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "step",
        [value("q", TensorProto.FLOAT, [1, 1, HEADS * SIZE]),
         *(value(name, TensorProto.FLOAT, [1, 1, KV_HEADS * SIZE]) for name in "kv"),
         *(value(name, element, cache) for name in ("pk", "pv")),
         value("lengths", TensorProto.INT32, [1]), value("total", TensorProto.INT32, [])],
        [value("out", TensorProto.FLOAT, [1, 1, HEADS * SIZE]),
         *(value(name, element, cache) for name in ("nk", "nv"))], scales)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return made.SerializeToString()


def steps(capacity: int) -> dict[str, float]:
    """Milliseconds of CPU of a step on a full cache, the median; the kinds take turns."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    random = np.random.default_rng(1)
    runs, times = {}, {kind: [] for kind in ELEMENTS}
    for kind, (_, dtype, parts) in ELEMENTS.items():
        session = ort.InferenceSession(model(kind, capacity), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        shape = (1, KV_HEADS, capacity, SIZE // parts)
        kept = [random.integers(0, 100, shape).astype(dtype) for _ in range(2)]
        for name, width in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            binding.bind_cpu_input(name, random.normal(size=(1, 1, width * SIZE)).astype(np.float32))
        for array, past, present in zip(kept, ("pk", "pv"), ("nk", "nv")):
            binding.bind_input(past, "cpu", 0, dtype, shape, array.ctypes.data)
            binding.bind_output(present, "cpu", 0, dtype, shape, array.ctypes.data)
        binding.bind_cpu_input("lengths", np.array([capacity - 1], np.int32))
        binding.bind_cpu_input("total", np.array(capacity, np.int32))
        binding.bind_output("out")
        runs[kind] = (session, binding, kept)
    for turn in range(REPEAT + 3):
        for kind, (session, binding, _) in runs.items():
            began = time.process_time()
            session.run_with_iobinding(binding)
            if turn >= 3:
                times[kind].append(1e3 * (time.process_time() - began))
    return {kind: statistics.median(found) for kind, found in times.items()}


def losses(checkpoint: Path, text: Path, work: Path) -> dict[str, dict[str, float]]:
    """The loss of a real model with each cache."""
    whole = text.read_text(encoding="utf-8")
    read, calibrate = work / "read.txt", work / "calibrate.txt"
    read.write_text(whole[: len(whole) // 2], encoding="utf-8")
    calibrate.write_text(whole[len(whole) // 2:], encoding="utf-8")
    found = {}
    for codes in MEASURED:
        bundle = gqa.export(checkpoint, work / codes, dtype="fp32", capacity=1024, quantize="dequantize",
                            kv_cache=codes, calibrate=calibrate)
        loss = measure(bundle, checkpoint, read)
        scales = bundle.manifest.kv_cache.scales
        found[codes] = {"kl_mean": loss.kl_mean, "kl_p99": loss.kl_p99, "top1": loss.top1, "tokens": loss.tokens,
                        "perplexity_increase": loss.perplexity_increase,
                        "most_clipped": max(max(each.key_clip, each.value_clip) for each in scales)}
    return found


def measure(bundle: gqa.Bundle, checkpoint: Path, text: Path):
    """The loss alone; `validate` measures it too, after its cases."""
    from gqa_export.checkpoint.load_model import load_model
    from gqa_export.checkpoint.open import open_checkpoint
    from gqa_export.progress import silent
    from gqa_export.runtime.ort.session import OrtSession
    from gqa_export.validation.loss import LossRequest, measure_loss
    from gqa_export.validation.reference import Reference

    opened = open_checkpoint(checkpoint)
    known = Reference(None, None, "", load_model(opened, "float32"), {}, opened, plain=False)
    return measure_loss(LossRequest(opened, text), OrtSession.load(bundle.folder, "cpu"), bundle.manifest,
                        bundle.folder, known, [], silent)


@click.command()
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--text", type=click.Path(exists=True, path_type=Path), required=True)
def main(checkpoint: Path, text: Path) -> None:
    """Measure, write docs/benchmarks/kv_cache.json."""
    import onnxruntime

    data = {"date": date.today().isoformat(), "machine": platform.machine(), "onnxruntime": onnxruntime.__version__,
            "checkpoint": checkpoint.name, "text": text.name, "heads": [HEADS, KV_HEADS, SIZE],
            "step_cpu_ms": {str(length): steps(length) for length in LENGTHS}}
    print(data["step_cpu_ms"])
    with tempfile.TemporaryDirectory(prefix="gqa-kv-cache-") as place:
        data["loss"] = losses(checkpoint, text, Path(place))
    print(data["loss"])
    (OUT / "kv_cache.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
