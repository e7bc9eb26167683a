"""Approximate attention against exact attention in ONNX Runtime on one thread of a CPU: one layer, one group of heads.

    python scripts/benchmark_long_attention.py --out docs/benchmarks
    python scripts/benchmark_long_attention.py --lengths 4096,8192      # print only

Each length runs `com.microsoft::GroupQueryAttention` and the function body of `gqa::LongGroupedQueryAttention` by both
methods in turn, the whole call including the selection; process seconds, the faster of the runs. Every method is
measured in a process of its own, whose peak memory is recorded. Writes long_attention.json, .md and .svg.

    python scripts/benchmark_long_attention.py --draw docs/benchmarks   # the picture again, from the committed result
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from gqa_export import long_attention_op as contract
from gqa_export.environment.versions import versions
from gqa_export.long_attention_op import DEFAULTS
from gqa_export.lowering.long_function import REQUIRED, attach_long_function

K, G, D = 1, 3, 64
H = K * G
LENGTHS = (4096, 8192, 16384, 32768)
NAMES = ("exact", "hyper", "tiles")
DEMANDED = {"hyper": {8192: 1.3, 16384: 2.0, 32768: 3.5}, "tiles": {8192: 1.6, 16384: 2.8, 32768: 4.5}}
"""at least so many times as fast as exact attention"""
LARGEST_GB = 1.0
MOST_PER_DOUBLING = 2.6


def exact_model() -> onnx.ModelProto:
    """One call of com.microsoft::GroupQueryAttention without a past."""
    info, real, whole = helper.make_tensor_value_info, TensorProto.FLOAT, TensorProto.INT32
    node = helper.make_node("GroupQueryAttention", ["q", "k", "v", "pk", "pv", "sl", "tl"], ["o", "rk", "rv"],
                            domain="com.microsoft", num_heads=H, kv_num_heads=K, scale=D**-0.5)
    inputs = [info("q", real, [1, "n", H * D]), info("k", real, [1, "n", K * D]), info("v", real, [1, "n", K * D]),
              info("pk", real, [1, K, "p", D]), info("pv", real, [1, K, "p", D]), info("sl", whole, [1]),
              info("tl", whole, [])]
    outputs = [info("o", real, [1, "n", H * D]), info("rk", real, [1, K, "t", D]), info("rv", real, [1, K, "t", D])]
    return helper.make_model(helper.make_graph([node], "exact", inputs, outputs), ir_version=10, opset_imports=[
        helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)])


def long_model(method: str) -> onnx.ModelProto:
    """One call of the op for long prompts, with its tables."""
    sizes = {"H*D": H * D, "K*D": K * D, "K*E": K * D, "H*E": H * D, "K": K, "D": D, "E": D, "H": H}
    types = {"int32": TensorProto.INT32, "int64": TensorProto.INT64}
    setting = DEFAULTS[method]
    tables = {"fractions": np.array(contract.fractions(0, 0, K, setting.samples), np.int64),
              "projections": np.array(contract.projections(0, 0, D), np.float32),
              "code_order": np.array(contract.code_order(), np.int64)}

    def info(port: Any) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(port.name, types.get(port.type, TensorProto.FLOAT),
                                             [sizes.get(letter, letter) for letter in port.shape])

    node = helper.make_node(contract.OP, [name if name in REQUIRED else "" for name in contract.INPUT_NAMES],
                            contract.OUTPUT_NAMES, domain=contract.DOMAIN, num_heads=H, kv_num_heads=K,
                            scale=D**-0.5, softcap=0.0, window=0, rotary_interleaved=0, growing=1,
                            **setting.attributes())
    graph = helper.make_graph(
        [node], "long", [info(port) for port in contract.INPUTS if port.name in REQUIRED and port.name not in tables],
        [info(port) for port in contract.OUTPUTS],
        [onnx.numpy_helper.from_array(array, name) for name, array in tables.items()])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    attach_long_function(model)
    return model


def measure(name: str, length: int, runs: int) -> dict[str, float]:
    """Process seconds of the fastest of `runs` calls, and the peak memory of this process."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    model = exact_model() if name == "exact" else long_model(name)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((1, length, size), dtype=np.float32) for size in (H * D, K * D, K * D))
    empty = np.zeros((1, K, 0, D), np.float32)
    feed = {"q": q, "k": k, "v": v, "pk": empty, "pv": empty, "sl": np.array([length - 1], np.int32),
            "tl": np.array(length, np.int32)} if name == "exact" else {
        "query": q, "key": k, "value": v, "past_key": empty, "past_value": empty,
        "past_lengths": np.zeros(1, np.int32), "new_lengths": np.array([length], np.int32),
        "sinks": np.full(H, -np.inf, np.float32)}
    output = ["o"] if name == "exact" else ["output"]
    seconds = []
    for _ in range(runs):
        start = time.process_time()
        session.run(output, feed)
        seconds.append(time.process_time() - start)
    return {"seconds": round(min(seconds), 4),
            "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3)}


def table(result: dict[str, Any]) -> str:
    """The result as a page."""
    rows = result["seconds"]
    lines = ["# Approximate attention on a CPU", "",
             "One layer with one group of 3 query heads of 64, fp32, one thread, seconds of the process, selection "
             "included; beside it how many times as fast as `com.microsoft::GroupQueryAttention` in the same run.", "",
             "Made by `scripts/benchmark_long_attention.py`.", "",
             "| tokens | exact | hyper | | tiles | |", "|---|---|---|---|---|---|"]
    for length in result["lengths"]:
        exact, hyper, tiles = (rows[name][str(length)] for name in NAMES)
        lines.append(f"| {length} | {exact:.2f} | {hyper:.2f} | {exact / hyper:.1f}x | {tiles:.2f} | "
                     f"{exact / tiles:.1f}x |")
    peaks = ", ".join(f"{name} {peak:.2f} GB" for name, peak in result["peak_gb"].items())
    lines += ["", f"Peak memory of the process at {result['lengths'][-1]} tokens: {peaks}.", "",
              "Settings: " + "; ".join(f"{name}: " + ", ".join(f"{key} {value}" for key, value in setting.items()
                                                              if key != "method")
                                       for name, setting in result["settings"].items()) + ".", "",
              "Versions: " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + "."]
    return "\n".join(lines) + "\n"


def picture(result: dict[str, Any]) -> str:
    """Time over length, logarithmic both."""
    sys.path.insert(0, str(Path(__file__).parent))
    from chart import Axis, Line, chart

    names = {"exact": "exact attention", "hyper": "hyper", "tiles": "tiles"}
    return chart("Attention of one layer on one thread: time over length",
                 Axis("tokens", result["lengths"], logarithmic=True),
                 Axis("seconds", (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10), logarithmic=True),
                 [Line(words, [(length, result["seconds"][name][str(length)]) for length in result["lengths"]])
                  for name, words in names.items()])


def main() -> None:
    """Measure, print, and write where --out is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("NAME", "LENGTH"), help="measure one in this process")
    parser.add_argument("--draw", type=Path, help="draw the result in this folder again")
    options = parser.parse_args()
    if options.draw:
        result = json.loads((options.draw / "long_attention.json").read_text())
        (options.draw / "long_attention.svg").write_text(picture(result))
        return
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), options.runs)))
        return
    lengths = [int(length) for length in options.lengths.split(",")]
    seconds: dict[str, dict[str, float]] = {name: {} for name in NAMES}
    peaks: dict[str, float] = {}
    for length in lengths:
        for name in NAMES:
            done = subprocess.run([sys.executable, __file__, "--one", name, str(length), "--runs", str(options.runs)],
                                  check=True, capture_output=True, text=True)
            found = json.loads(done.stdout)
            seconds[name][str(length)], peaks[name] = found["seconds"], found["peak_gb"]
            print(name, length, found, flush=True)
    result = {"lengths": lengths, "seconds": seconds, "peak_gb": peaks, "heads": [H, K, D],
              "settings": {name: DEFAULTS[name].attributes() for name in ("hyper", "tiles")},
              "versions": versions(("onnxruntime", "onnx"), absent="unknown")}
    print(table(result))
    if options.out:
        (options.out / "long_attention.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / "long_attention.md").write_text(table(result))
        (options.out / "long_attention.svg").write_text(picture(result))


if __name__ == "__main__":
    main()
