"""The page of `benchmark_quantize.py`, and the table of docs/quantization.md that is made from its figures."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- figures: made by scripts/benchmark_quantize.py -->", "<!-- end of figures -->"
BEGIN_INPUTS = "<!-- figures of FP8: made by scripts/benchmark_quantize.py -->"
Result = Mapping[str, Any]
WORDS = {True: "passed", False: "DIFFERENT", None: "-"}


def machine() -> str:
    """Processor and cores."""
    from gqa_export.environment.machine import cores, processor

    return f"{processor()} ({platform.machine()}), {cores()} cores"


def verdicts(report: Any) -> dict[str, Any]:
    """Of a comparison: whether it passed, and by how much logits differ in each case that is not as shipped."""
    exact = {case.name: kind.max_abs for case in report.cases if not case.name.startswith("shipped ")
             for kind in case.kinds if kind.kind == "logits"}
    return {"exact": report.export_exact, "shipped": report.as_shipped, "logits": exact}


def of_tensorrt(result: Result) -> list[str]:
    """The table of FP8."""
    found = result["tensorrt"]
    return [*table(["SmolLM2-135M-Instruct", "MB", "KL, nats", "perplexity", "same best token", "export exact",
                    "as shipped"],
                   [[name, f"{row['megabytes']:.1f}", f"{row['kl_mean']:.4f}", f"{row['perplexity_increase']:+.2f} %",
                     f"{100 * row['top1']:.1f} %",
                     *(WORDS[row[part]] for part in ("exact", "shipped"))]
                    for name, row in found["rows"].items()]), "",
            f"{found['date']}, {result['machine']}: target `trt-native`, fp16, the graph run by ONNX Runtime in fp32; "
            f"no engine was run. Loss against float32 on {found['tokens']} tokens; the text's second half calibrates. "
            "`-`: no input is rounded, export exact is the whole verdict."]


def rows(result: Result) -> list[list[str]]:
    """A row for each bundle: name, megabytes, KL, perplexity, top 1, speed at the first length."""
    exported, lost, first = result["export"], result["loss"]["rows"], result["decode"]["rows"][0]
    made = []
    for name, loss in lost.items():
        speed = first["speed"].get(name, {}).get("ratio")
        made.append([name, f"{exported['megabytes'][name]:.1f}", f"{loss['kl_mean']:.4f}",
                     f"{loss['perplexity_increase']:+.2f} %", f"{100 * loss['top1']:.1f} %",
                     "1" if name in first["core_ms"] and speed is None else "-" if speed is None else f"{speed:.2f}"])
    return made


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    """A table of Markdown."""
    return [f"| {' | '.join(each)} |" for each in (head, ["---"] * len(head), *lines)]


def figures(result: Result) -> list[str]:
    """The table of what to choose."""
    lost = result["loss"]
    return [*table(["SmolLM2-135M-Instruct", "MB", "KL, nats", "perplexity", "same best token", "decode speed"],
                   rows(result)), "",
            f"{lost['date']}, {result['machine']}, ONNX Runtime {result['versions']['onnxruntime']}, onnxruntime-genai "
            f"{result['versions']['onnxruntime-genai']}. Loss against float32 on {lost['tokens']} tokens, inputs of "
            "products rounded to int8 as shipped; speed after 128 tokens, one thread, as a share of genai's int4. "
            f"The model's own file (Q4_1) has {result['export']['gguf_mb']:.1f} MB. All figures: "
            "[benchmarks/quantize.md](benchmarks/quantize.md)."]


def markdown(result: Result) -> str:
    """All figures as a page."""
    exported, lost, decode, large = (result[part] for part in ("export", "loss", "decode", "large"))
    kept = lost["kept"]
    lines = ["# What quantizing costs and gains", "",
             f"{result['machine']}; " + ", ".join(f"{name} {found}" for name, found in result["versions"].items())
             + ". Made by `scripts/benchmark_quantize.py`.", "", "## Size, loss, speed", "", *figures(result)[:-1],
             f"Loss ({lost['date']}): {lost['tokens']} tokens of {lost['text']} in windows of {lost['window']}, "
             "against PyTorch in float32; int4 is calibrated on the text's second half. The model's own file has "
             f"{exported['gguf_mb']:.1f} MB.", "",
             f"The kept bundle beside PyTorch in fp64, inputs not rounded, and PyTorch in fp32 beside "
             f"it, the largest of {kept['draws']} draws of its rounding errors: {_verdict(kept)}", "",
             *table(["case", "logits of the bundle", "of PyTorch"],
                    [[name, f"{found:.1e}", f"{kept['pytorch'][name]:.1e}"] for name, found in kept["logits"].items()]),
             "", "## For TensorRT", "", *of_tensorrt(result), ""]
    names = list(decode["rows"][0]["core_ms"])
    lines += ["## Decode", "", f"{decode['date']}, load {decode['load_average']}; {decode['steps']} steps of each in "
              "turn, one thread, fresh processes: milliseconds on a core, and speed as a share of the peer's int4 "
              "(geometric mean of the rounds; the rounds).", "",
              *table(["past", *names], [[str(row["past"]), *(f"{row['core_ms'][name]:.1f}" for name in names)]
                                        for row in decode["rows"]]), "",
              *table(["past", *decode["rows"][0]["speed"]],
                     [[str(row["past"]), *(f"{each['ratio']:.3f} ({', '.join(map(str, each['rounds']))})"
                                           for each in row["speed"].values())] for row in decode["rows"]]), "",
              "## Exports", "",
              f"{exported['date']}; whole processes, {exported['runs']} runs in turn, medians (least to most); the "
              "calibrated one once. Bytecode compiled, no trace kept.", "",
              *table(["export", "wall s", "CPU s", "peak MB"],
                     [[name, *(_median(costs, figure) for figure in ("wall_s", "cpu_s", "peak_mb"))]
                      for name, costs in exported["costs"].items()]
                     + [["int4 --calibrate", *(f"{exported['calibrated'][figure]:.1f}"
                                               for figure in ("wall_s", "cpu_s", "peak_mb"))]]), "",
              "## Large", "", f"{large['date']}; Llama-2-7B's shape, bfloat16, weights that are holes, `--quantize "
              "int4`, one process each.", "",
              *table(["layers", "checkpoint MB", "written MB", "wall s", "CPU s", "peak MB"],
                     [[layers, *(f"{row[figure]:.0f}" for figure in ("checkpoint_mb", "written_mb", "wall_s", "cpu_s",
                                                                     "peak_mb"))]
                      for layers, row in large["layers"].items()])]
    return "\n".join(lines) + "\n"


def _verdict(kept: Mapping[str, Any]) -> str:
    return "exact." if kept["exact"] else "DIFFERENT."


def _median(costs: list[Mapping[str, float]], figure: str) -> str:
    values = sorted(cost[figure] for cost in costs)
    return f"{statistics.median(values):.1f} ({values[0]:.1f} - {values[-1]:.1f})"


def documented(text: str, result: Result) -> str:
    """A page with its table made again between the marks."""
    for begin, lines in ((BEGIN, figures(result)), (BEGIN_INPUTS, of_tensorrt(result))):
        made = "\n".join([begin, *lines, END])
        before, _, rest = text.partition(begin)
        text = before + made + rest.partition(END)[2] if rest else text
    return text


def write(result: Result, out: Path) -> None:
    """quantize.md, and the table in the page beside the folder."""
    (out / "quantize.md").write_text(markdown(json.loads(json.dumps(result))), encoding="utf-8")
    page = out.parent / "quantization.md"
    if page.exists():
        page.write_text(documented(page.read_text(encoding="utf-8"), result), encoding="utf-8")
