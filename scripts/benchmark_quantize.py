"""What quantizing costs and gains, beside onnxruntime-genai's own int4 and int8 of the same model.

    python scripts/benchmark_quantize.py --text TEXT --scratch FOLDER --out docs/benchmarks [--only export]

SmolLM2-135M-Instruct: its Q4_1 file kept as it is, and its values as a float32 checkpoint quantized by us and by the
peer. Five parts, each can be made alone with `--only`, the others stay as they are committed:

- export: whole processes in turn (`evidence.whole_process`): time and memory, and the size of what is written; the
  calibrated export once;
- loss: KL divergence, perplexity and best tokens on the first tokens of TEXT, against PyTorch in float32; whether the
  kept bundle is exact, with inputs that are not rounded, and how exact PyTorch is. TEXT's second half calibrates;
- decode: steps of the bundles in turn, in rounds (`evidence.decode_in_turn`);
- tensorrt: FP8 for TensorRT, without and with the inputs of products: both verdicts and the loss, the graph run on a
  CPU;
- large: a checkpoint of Llama-2-7B's shape whose weights are holes, to int4: memory at 8 and 32 layers.

SmolLM2's weights are Q4_1: int4 with minima would be exact on it and prove nothing, so the recipes here are symmetric.
Writes quantize.json, and once it has all parts quantize.md and the table of docs/quantization.md; takes half an hour.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import gqa_models
import numpy as np
from evidence import quantize_inputs, quantize_page
from evidence.decode_in_turn import PEER, STEPS, for_one_thread, rounds, speeds
from evidence.float_checkpoint import packaged_gguf, write_float_checkpoint
from evidence.whole_process import Program, compare, run_once
from sparse_checkpoint import write_sparse

ROOT = Path(__file__).resolve().parent.parent
SHAPE, LARGE, DEPTHS = "smollm2", "llama-2-7b", (8, 32)
KEPT, INT4, SAME, CALIBRATED, INT8 = "Q4_1 kept", "int4", "int4, --head same", "int4 --calibrate", "int8"
PEER4, PEER8 = f"{PEER}, int4", f"{PEER}, int8"
OURS = {KEPT: (), INT4: ("--quantize", "int4"), SAME: ("--quantize", "int4", "--head", "same"),
        INT8: ("--quantize", "int8")}
PEERS = {PEER4: "int4", PEER8: "int8"}
TIMED = (KEPT, INT4, INT8, PEER4, PEER8)
"""whose exports are timed in turn"""
LENGTHS, ROUNDS, ROOM = (128, 1024), 6, 2048
WINDOW, TOKENS = 512, 2048
VERSIONS = ("torch", "transformers", "onnxruntime", "onnxruntime-genai")


class Files:
    """What the parts share: the checkpoints and texts, made when first asked for."""

    def __init__(self, scratch: Path, text: Path) -> None:
        self.scratch, self.text = scratch, text
        self.gguf = packaged_gguf()

    @property
    def float(self) -> Path:
        """The float32 checkpoint."""
        folder = self.scratch / "float"
        return folder if folder.exists() else write_float_checkpoint(self.gguf, folder)

    @property
    def calibration(self) -> Path:
        """The second half of the text."""
        file = self.scratch / "calibration.txt"
        whole = self.text.read_text(encoding="utf-8")
        file.write_text(whole[len(whole) // 2:], encoding="utf-8")
        return file

    def command(self, name: str, folder: Path) -> list[str]:
        """The export of a row into a folder."""
        if name in PEERS:
            return [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(self.float), "-o", str(folder),
                    "-p", PEERS[name], "-e", "cpu", "-c", str(self.scratch / "cache")]
        options = ("--quantize", "int4", "--calibrate", str(self.calibration)) if name == CALIBRATED else OURS[name]
        source = self.gguf if name == KEPT else self.float
        return [sys.executable, "-m", "gqa_export", "onnx", str(source), "-o", str(folder), "--no-validate", "--dtype",
                "fp32", "--cache", "static", "--capacity", str(ROOM), *options]

    def bundle(self, name: str) -> Path:
        """The bundle of a row."""
        folder = self.scratch / "bundles" / name.replace(" ", "_")
        if not folder.exists():
            run_once(self.command(name, folder), {})
        return folder


def megabytes(folder: Path) -> float:
    """The model's files: graph and weights."""
    files = {file for pattern in ("*.onnx", "*.data", "*.bin", "*.safetensors") for file in folder.glob(pattern)}
    return sum(file.stat().st_size for file in files if file.name != "quantization.safetensors") / 1e6


def export(files: Files) -> dict[str, Any]:
    """Time and memory of each export, the sizes of all."""
    def program(name: str) -> Program:
        def command(number: int) -> list[str]:
            place = files.scratch / "timed" / name.replace(" ", "_")
            shutil.rmtree(place, ignore_errors=True)
            return files.command(name, place / str(number))

        return Program(command, {"GQA_EXPORT_TRACE_CACHE": "off"},
                       source=None if name in PEERS else ROOT / "gqa_export")

    found = compare({name: program(name) for name in TIMED}, 5, peers=[PEER4], packages=VERSIONS, tell=click.echo)
    shutil.rmtree(files.scratch / "timed")
    once = run_once(files.command(CALIBRATED, files.scratch / "timed"), {"GQA_EXPORT_TRACE_CACHE": "off"})
    shutil.rmtree(files.scratch / "timed")
    return {**found, "calibrated": vars(once), "gguf_mb": files.gguf.stat().st_size / 1e6,
            "megabytes": {name: megabytes(files.bundle(name)) for name in (*OURS, CALIBRATED, *PEERS)}}


def ours(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A bundle of ours: ids [T] -> logits [T, V], over an empty cache."""
    from gqa_export.runtime.open_session import open_bundle

    session = open_bundle(folder, "cpu")

    def run(ids: np.ndarray) -> np.ndarray:
        session.reset(1)
        return np.asarray(session.step(ids[None]).logits[0])

    return run


def theirs(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The peer's graph in ONNX Runtime, over an empty cache."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    decoder = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    empty = np.zeros([1, decoder["num_key_value_heads"], 0, decoder["head_size"]], np.float32)
    past = {each.name: empty for each in session.get_inputs() if each.name.startswith("past_key_values")}
    known = {each.name for each in session.get_inputs()}

    def run(ids: np.ndarray) -> np.ndarray:
        feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64),
                 "position_ids": np.arange(len(ids))[None], **past}
        return np.asarray(session.run(["logits"], {name: feeds[name] for name in feeds if name in known})[0][0])

    return run


def windows(files: Files) -> Iterator[np.ndarray]:
    """Token ids of the text, in windows without overlap."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(files.float)(files.text.read_text(encoding="utf-8")[:40 * TOKENS])["input_ids"]
    for start in range(0, TOKENS, WINDOW):
        yield np.array(ids[start: start + WINDOW], np.int64)


def loss(files: Files) -> dict[str, Any]:
    """What each bundle lost, and whether the kept one is exact."""
    import gqa_export as gqa
    from gqa_export.checkpoint.load_model import load_model
    from gqa_export.checkpoint.open import open_checkpoint
    from gqa_export.compare.loss import LossTally
    from gqa_export.runtime.torch_session import TorchSession

    reference = TorchSession(load_model(open_checkpoint(files.float), "float32"), ROOM, "float32")
    runs = {name: ours(files.bundle(name)) for name in (*OURS, CALIBRATED)}
    runs |= {name: theirs(files.bundle(name)) for name in PEERS}
    tallies = {name: LossTally() for name in runs}
    for ids in windows(files):
        reference.reset(1)
        expected = reference.step(ids[None]).logits[0]
        for name, run in runs.items():
            tallies[name].begin()
            tallies[name].add(ids, expected, run(ids))
        click.echo("a window is read")
    found = {}
    for name, tally in tallies.items():
        each = tally.loss("float32", "float32", files.text.name, "", TOKENS // WINDOW, None, None)
        found[name] = {"kl_mean": each.kl_mean, "kl_p99": each.kl_p99, "top1": each.top1,
                       "perplexity": each.perplexity, "perplexity_increase": each.perplexity_increase}
    def validated() -> Any:
        return gqa.open_bundle(files.bundle(KEPT)).validate(files.gguf)

    return {"text": files.text.name, "tokens": TOKENS, "window": WINDOW, "rows": found,
            "kept": {**quantize_page.verdicts(validated()), "pytorch": quantize_inputs.own_errors(validated),
                     "draws": 1 + len(quantize_inputs.DRAWS)}}


def tensorrt(files: Files) -> dict[str, Any]:
    """What FP8 costs and loses."""
    rows = {}
    for name in quantize_inputs.RECIPES:
        folder = files.scratch / "tensorrt" / name.replace(", ", "-").replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        cost = run_once([sys.executable, "-m", "gqa_export", *quantize_inputs.command(
            name, files.float, files.calibration, folder, WINDOW)], {"GQA_EXPORT_TRACE_CACHE": "off"})
        rows[name] = {"megabytes": megabytes(folder), "cpu_s": cost.cpu_s, "peak_mb": cost.peak_mb,
                      **quantize_inputs.judged(folder, files.float, files.calibration, files.text)}
        click.echo(json.dumps({name: rows[name]}))
    return {"text": files.text.name, "tokens": TOKENS, "window": WINDOW, "rows": rows}


def decode(files: Files) -> dict[str, Any]:
    """Speeds of decoding, as shares of the peer's int4."""
    names = (KEPT, INT4, SAME, INT8)
    bundles = {name: files.bundle(name) for name in names} | {PEER4: for_one_thread(files.bundle(PEER4))}
    done = rounds(bundles, gqa_models.shape(SHAPE)["vocab_size"], [LENGTHS] * ROUNDS, ROOM, click.echo)
    rows = []
    for length in LENGTHS:
        steps = [one["steps"][str(length)] for one in done]
        rows.append({"past": length, "core_ms": {name: round(statistics.median(
            pair[1] for one in steps for pair in one[name]), 2) for name in bundles}, "speed": {}})
        for name in names:
            each = speeds(steps, name, PEER4)
            rows[-1]["speed"][name] = {"ratio": round(statistics.geometric_mean(each), 3), "rounds": each}
        click.echo(json.dumps(rows[-1]))
    return {"steps": STEPS, "load_average": round(os.getloadavg()[0], 1), "rows": rows}


def large(files: Files) -> dict[str, Any]:
    """Time and memory of int4 at scale."""
    rows = {}
    for layers in DEPTHS:
        folder = files.scratch / f"large-{layers}"
        for left in (folder, files.scratch / "out"):
            shutil.rmtree(left, ignore_errors=True)
        write_sparse(LARGE, folder, layers=layers)
        cost = run_once([sys.executable, "-m", "gqa_export", "onnx", str(folder), "-o", str(files.scratch / "out"),
                         "--no-validate", "--quantize", "int4"], {"GQA_EXPORT_TRACE_CACHE": "off"})
        rows[str(layers)] = {**vars(cost), "written_mb": megabytes(files.scratch / "out"),
                             "checkpoint_mb": sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6}
        shutil.rmtree(folder)
        shutil.rmtree(files.scratch / "out")
        click.echo(json.dumps(rows[str(layers)]))
    return {"shape": gqa_models.shape(LARGE), "layers": rows}


PARTS: dict[str, Callable[[Files], dict[str, Any]]] = {"export": export, "loss": loss, "decode": decode,
                                                     "tensorrt": tensorrt, "large": large}


@click.command()
@click.option("--text", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--scratch", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--only", multiple=True, type=click.Choice(list(PARTS)), help="A part; the others stay as they are.")
def main(text: Path, scratch: Path, out: Path, only: tuple[str, ...]) -> None:
    """Measure, print and write the result."""
    file = out / "quantize.json"
    result = json.loads(file.read_text(encoding="utf-8")) if only and file.exists() else {}
    scratch.mkdir(parents=True, exist_ok=True)
    for name in only or PARTS:
        result[name] = {"date": date.today().isoformat(), **PARTS[name](Files(scratch, text))}
        result["machine"] = quantize_page.machine()
        result["versions"] = {each: version(each) for each in VERSIONS}
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if set(PARTS) <= set(result):
        quantize_page.write(result, out)


if __name__ == "__main__":
    main()
