"""The mutation table: good bundles broken on purpose, and which case of the suite catches each kind.

    python scripts/mutation_table.py                              # tiny models: docs/trust.md, mutations.json
    python scripts/mutation_table.py --checkpoint smollm2.gguf    # a real model: mutations_smollm2.json, .md
"""

from __future__ import annotations

import json
import platform
import tempfile
from datetime import date
from pathlib import Path

import click
from evidence.mutations.contradictions import CONTRADICTIONS
from evidence.mutations.kinds import MUTATIONS
from evidence.mutations.of_inputs import INPUT_CONTRADICTIONS
from evidence.mutations.table import (
    STEPS,
    Row,
    Sample,
    contradiction_rows,
    needed,
    open_sample,
    prove,
    shares,
    table,
    to_dict,
)

from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx

ROOT = Path(__file__).resolve().parent.parent
TINY = (("llama", "ort", "growing"), ("mistral", "ort", "growing"), ("gemma2", "ort", "growing"),
        ("gpt_oss", "ort", "growing"), ("qwen2", "ort", "growing"), ("qwen3", "ort", "growing"),
        ("llama", "portable", "growing"), ("mistral", "onnx", "static"), ("llama4", "ort", "growing"),
        ("qwen3_next", "ort", "growing"), ("gemma3n", "ort", "growing"))
CAPACITY = 128
OUT, NAME, REAL = ROOT / "docs" / "benchmarks", "mutations", "mutations_smollm2"
BEGIN, END = "<!-- mutations: made by scripts/mutation_table.py -->", "<!-- end of mutations -->"


def tiny_samples(work: Path, wanted=TINY) -> list[Sample]:
    """Export tiny models and load their checkpoints."""
    from gqa_models import write_tiny

    samples, written = [], {}
    for name, target, cache in wanted:
        if name not in written:
            written[name] = write_tiny(name, work / name)
        bundle = work / f"{name}-{target}-{cache}"
        export_onnx(written[name], bundle, ExportOptions(target=target, cache=cache, capacity=CAPACITY, dtype="fp32"))
        samples.append(open_sample(f"{name} {target}", bundle, written[name]))
    return samples


def odd_samples(work: Path) -> list[Sample]:
    """Tiny bundles with quantized weights, quantized caches, and caches whose slots are used again."""
    from evidence.mutations.quantized_samples import TEXT, add_tokenizer, write_fp8, write_gptq, write_odd
    from gqa_models import write_tiny

    text = work / "text.txt"
    text.write_text(TEXT)
    odd, gptq, experts = write_odd(work / "odd"), write_gptq(work / "gptq"), write_tiny("mixtral", work / "experts")
    even = add_tokenizer(write_tiny("llama", work / "even"))  # blocks of 16, of which 136 columns have no whole number
    windows = write_tiny("gpt_oss", work / "windows", num_hidden_layers=2)
    exact, codes = {"quantize": "int4", "activations": "exact"}, {"kv_cache": "int8", "calibrate": text}
    same, given = {"activations": "same"}, {"activations": "same", "calibrate": text}
    samples = []
    for name, checkpoint, options in (
            ("llama ort, int4", odd, {"quantize": "int4"}), ("llama ort, int4, exact", odd, exact),
            ("llama ort, GPTQ kept", gptq, {}), ("mixtral ort, int4, exact", experts, exact),
            ("llama ort, int8 cache", odd, codes), ("llama ort, int4 cache", odd, {**codes, "kv_cache": "int4"}),
            ("llama portable, int8 cache", odd, codes), ("llama onnx, int8 cache", odd, codes),
            ("gpt_oss portable, rings", windows, {"window_cache": "small", "prompt_chunk": 5}),
            ("llama trt-native, fp8", even, {"quantize": "fp8"}),
            ("llama trt-native, nvfp4", even, {"quantize": "nvfp4"}),
            ("llama trt-native, fp8 inputs, kept", write_fp8(work / "kept"), same),
            ("llama trt-native, fp8 inputs", even, {**given, "quantize": "fp8"}),
            ("llama trt-native, nvfp4 inputs", even, {**given, "quantize": "nvfp4"})):
        bundle = work / name.replace(" ", "-").replace(",", "")
        target = name.split()[1].rstrip(",")
        export_onnx(checkpoint, bundle, ExportOptions(target=target, capacity=CAPACITY, dtype="fp32", **options))
        samples.append(open_sample(name, bundle, checkpoint, text if options.get("activations") == "same" else None))
    return samples


@click.command()
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), help="A real model instead of tiny ones.")
@click.option("--capacity", default=256, show_default=True, help="Capacity of the real model's bundle.")
@click.option("--only", multiple=True, help="A kind of damage, known to the table or not; its other rows stay.")
def main(checkpoint: Path | None, capacity: int, only: tuple[str, ...]) -> None:
    """Break bundles, run the suite, write the table."""
    behaviour = [kind for kind in MUTATIONS if not only or kind.name in only]
    against = [kind for kind in (*CONTRADICTIONS, *INPUT_CONTRADICTIONS) if not only or kind.name in only]
    if len(behaviour) + len(against) < len(only):
        raise click.BadParameter("no such kind of damage", param_hint="--only")
    with tempfile.TemporaryDirectory(prefix="gqa-mutations-") as place:
        work = Path(place)
        if checkpoint is None:
            samples = [*tiny_samples(work), *odd_samples(work)]
        else:
            export_onnx(checkpoint, work / "bundle", ExportOptions(
                target="ort", dtype="fp32", capacity=capacity, quantize="dequantize"))  # what codes add is tried above
            samples = [open_sample(checkpoint.stem, work / "bundle", checkpoint)]
        names = [sample.name for sample in samples]
        proved = needed(samples, [*behaviour, *against], work) if only else samples
        rows = prove(proved, work, tell, behaviour, quick_first=checkpoint is not None)
        for row in contradiction_rows(samples, work, against):
            tell(row)
            rows.append(row)
    if only:
        rows = merged(rows, OUT / f"{REAL if checkpoint else NAME}.json")
    write(rows, names, real=checkpoint is not None)


def tell(row: Row) -> None:
    """Print a row as it is known."""
    click.echo(f"{row.kind}: {row.caught}")


def merged(rows: list[Row], committed: Path) -> list[Row]:
    """The committed rows with these in place of theirs, or beside them, in the order of the kinds."""
    old = json.loads(committed.read_text(encoding="utf-8"))["rows"]
    known = {row["kind"]: Row(**{**row, "caught": {k: tuple(v) for k, v in row["caught"].items()}}) for row in old}
    known.update({row.kind: row for row in rows})
    return [known[kind.name] for kind in (*MUTATIONS, *CONTRADICTIONS, *INPUT_CONTRADICTIONS) if kind.name in known]


def write(rows: list[Row], samples: list[str], *, real: bool) -> None:
    """Put the rows where they belong."""
    caught = "; ".join(f"`{level}` catches {share:.0%}" for level, share in shares(rows).items())
    text = f"{len(rows)} kinds of damage: {caught}.\n\n{table(rows)}\n"
    name = REAL if real else NAME
    data = to_dict(rows, samples)
    (OUT / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if real:
        (OUT / f"{name}.md").write_text(
            f"# Damage done to {samples[0]}\n\n{date.today().isoformat()}, {platform.machine()}, CPU. Made by "
            f"`scripts/mutation_table.py --checkpoint FILE`; {STEPS} decode steps a case. `full` contains the cases of "
            "`quick`, so it was run only for what `quick` missed. Kinds that break what this model does not have "
            f"(a window, sinks, a softcap, a bias) are left out.\n\n{text}", encoding="utf-8")
        return
    page = ROOT / "docs" / "trust.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
