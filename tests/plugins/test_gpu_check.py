"""`scripts/gpu_check.py` where there is no GPU: it says so and exits with 3; its reports, from made-up results."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gqa_plugins.grouped_attention import gpu_report

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.py"


ENGINE = {"flavor": "rtx", "version": "1.7", "attention": "plugin", "dtype": "fp16", "passed": True,
          "note": "largest difference of logits 0.01", "build_s": 9.4, "step_ms": 0.5, "tokens_s": 2000.0,
          "of_copy": 0.81, "length": 1976}
"""Invented, as all figures here."""


RAGGED = {"kind": "ragged", "shape": "32/8 D128 bfloat16", "batch": 16, "length": 131072, "ours_ms": 0.2,
          "step_ms": 0.21, "gb_s": 3600.0, "of_copy": 0.9, "tflop_s": 0.0, "peers": {"flash-attn-3": 0.25}}
MODEL = {"model": "8B random", "length": 2048, "step_ms": 5.0, "tokens_s": 200.0, "of_copy": 0.85, "difference": 0.0,
         "passed": True}
COUNTERS = {"decode": {"DRAM bytes": "2.1 Gbyte"}, "notes": ["prefill: no counters (did not end in time)"]}


def decode_row(batch: int, length: int, ours: float, of_copy: float, **peers) -> dict:
    return {"kind": "decode", "shape": "32/8 D128 bfloat16", "batch": batch, "length": length, "ours_ms": ours,
            "step_ms": ours * 1.1, "gb_s": 4000 * of_copy, "of_copy": of_copy, "tflop_s": 0.0, "peers": peers}


@pytest.fixture
def results() -> dict:
    """Invented figures, to exercise the writers: they measure nothing."""
    return copy.deepcopy({
        **gpu_report.nothing(),
        "when": "2000-01-01T00:00:00+00:00", "command": "python scripts/gpu_check.py --out x", "card": "Invented GPU",
        "versions": {"torch": "0.0", "triton": "0.0"}, "ceilings": {"copy_gb_s": 4000.0, "matmul_tflop_s": 700.0},
        "correctness": [{"case": "32/8x128 bf16", "kernel": "decode", "error": 1e-3, "allowed": 4e-3, "passed": True}],
        "graph": {"passed": True, "note": "largest difference 0"},
        "decode": [decode_row(1, 1024, 0.01, 0.1, **{"sdpa-flash": 0.02, "sdpa-cudnn": "did not run: no | kernel"}),
                   decode_row(16, 32768, 0.5, 0.93, **{"sdpa-flash": 0.6})],
        "prefill": [{**decode_row(1, 8192, 1.0, 0.0, **{"sdpa-flash": 0.95}), "kind": "prefill", "tflop_s": 500.0}],
        "smoke": [{"case": "32/8x128 fp16", "kernel": "prefill", "error": 1e-3, "allowed": 4e-3, "passed": True}],
        "shipping": [{"case": "32/8x128 bf16", "kernel": "decode, C++ harness", "error": 1e-3, "allowed": 4e-3,
                      "passed": True, "same_bits": True}], "shipping_note": "kernels as carried",
        "ragged": [RAGGED], "counters": COUNTERS,
        "model": [{"case": "Llama of 3 layers", "kernel": "transformers' model with our op", "error": 1e-3,
                   "allowed": 4e-3, "passed": True}], "model_speed": MODEL,
        "sanitizer": {"passed": None, "note": "compute-sanitizer is not on the PATH"}})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: the check would really run")
def test_without_a_gpu_the_script_says_so_and_exits_with_3(tmp_path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr.startswith("not checked: ")
    assert "CUDA" in done.stderr
    assert not (tmp_path / "out").exists()


def test_help_names_the_exit_codes_and_options() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    for text in ("--out", "--quick", "--only", "--checkpoint", "--budget", "--resume", "--kernels", "--write-kernels",
                 "Exit: 0 correct, 1 a kernel or an engine is wrong, 3 nothing to run on"):
        assert text in done.stdout


def test_everything_shown_is_a_yes_in_the_table(results) -> None:
    text = gpu_report.table(results)
    assert text.startswith("Invented GPU: copy 4000 GB/s, bf16 product 700 TFLOP/s\n")
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["yes"] * 8 + ["not"]
    assert max(map(len, text.splitlines())) < 140


@pytest.mark.parametrize(("change", "line"), [
    (lambda r: r["correctness"][0].update(passed=False), 0),
    (lambda r: r["smoke"][0].update(passed=False), 0),
    (lambda r: r["graph"].update(passed=False), 1),
    (lambda r: r["shipping"][0].update(passed=False), 2),
    (lambda r: r["decode"][1].update(of_copy=0.89), 3),
    (lambda r: r["ragged"][0].update(of_copy=0.84), 4),
    (lambda r: r["decode"][0].update(ours_ms=0.021), 5),
    (lambda r: r["prefill"][0].update(ours_ms=1.1), 6),
    (lambda r: r["model"][0].update(passed=False), 7),
    (lambda r: r["model_speed"].update(passed=False), 7),
    (lambda r: r["sanitizer"].update(passed=False), 8),
])
def test_each_miss_is_a_no_in_its_own_line_only(results, change, line) -> None:
    change(results)
    shown = [passed for _, passed, _ in gpu_report.verdicts(results)]
    assert [n for n, passed in enumerate(shown) if passed is False] == [line]
    wrong = [row for row in gpu_report.judged(results) if row.get("passed") is False]
    assert bool(wrong) == (line not in (3, 4, 5, 6)), "what is slow is not wrong"


def test_an_engine_that_passed_failed_or_did_not_run_is_said_to_have(results) -> None:
    refused = {**ENGINE, "attention": "native", "passed": None, "note": "TensorRT for RTX does not build for 9.0",
               "build_s": None, "step_ms": None, "tokens_s": None, "of_copy": None}
    results["engines"] = [ENGINE, {**ENGINE, "flavor": "tensorrt", "passed": False}, refused]
    shown = gpu_report.verdicts(results)[-3:]
    assert [passed for _, passed, _ in shown] == [True, False, None]
    assert "2000 tokens/s, 81% of copy" in shown[0][2]
    text = gpu_report.markdown(results)
    rows = [line for line in text.split("## Engines")[1].split("##")[0].splitlines() if line.startswith("|")]
    assert len(rows) == 5
    assert len({line.count("|") for line in rows}) == 1
    assert "not measured" in rows[-1]
    assert "does not build for 9.0" in rows[-1]


def test_nothing_measured_is_never_a_yes(results) -> None:
    results.update(gpu_report.nothing())
    assert [passed for _, passed, _ in gpu_report.verdicts(results)] == [None] * 9
    assert gpu_report.judged(results) == []
    assert "not measured" in gpu_report.markdown(results)


def test_peer_that_did_not_run_is_never_the_fastest(results) -> None:
    assert gpu_report.fastest(results["decode"][0]["peers"], gpu_report.SDPA) == ("sdpa-flash", 0.02)
    assert gpu_report.fastest({"sdpa-math": "did not run"}) is None


def test_json_and_markdown_are_written_whole(results, tmp_path) -> None:
    as_json, as_markdown = gpu_report.write(results, tmp_path / "deep" / "out")
    assert json.loads(as_json.read_text()) == results
    text = as_markdown.read_text()
    for part in ("2000-01-01", "Invented GPU", "torch 0.0", "python scripts/gpu_check.py --out x", "4000 GB/s",
                 "93%", "## Decode", "## Prefill", "## Correctness", "did not run: no / kernel", "0.5000",
                 "## Decode of a ragged batch", "3600", "200", "2.1 Gbyte", "- prefill: no counters", "as carried"):
        assert part in text
    decode = text.split("## Decode")[1].split("##")[0]
    widths = {line.count("|") for line in decode.splitlines() if line.startswith("|")}
    assert len(widths) == 1


@pytest.mark.kernels
def test_correctness_part_runs_over_caches_of_codes_where_the_gpu_converts_them(monkeypatch) -> None:
    from gqa_plugins.grouped_attention import gpu_correctness

    monkeypatch.setattr(gpu_correctness, "CODED_HEAD", 16)
    case = gpu_correctness.Case(2, 1, 16, 8, torch.float32, ((20, 2), (0, 1)), 2, rotary=8)
    for capability, caches in ((80, ["int8"]), (89, ["int8", "fp8"])):
        rows = gpu_correctness.check(case, torch.device("cpu"), capability)
        assert [row["kernel"] for row in rows] == ["prefill", "decode", *(
            f"{kernel}, {cache} cache" for cache in caches for kernel in ("prefill", "decode"))]
        assert all(row["passed"] for row in rows)
    original = gpu_correctness.append

    def halved(*arguments, codes=None, **options):
        wrong = codes and dataclasses.replace(codes, value_scale=codes.value_scale / 2)
        return original(*arguments, **options, codes=wrong)

    monkeypatch.setattr(gpu_correctness, "append", halved)
    assert not any(row["passed"] for row in gpu_correctness.check(case, torch.device("cpu"), 80)[2:])


@pytest.mark.kernels
def test_correctness_part_passes_here_through_the_interpreter_and_catches_a_wrong_kernel(monkeypatch) -> None:
    """The code that judges a GPU is run on the CPU, once right and once with a kernel made wrong."""
    from gqa_plugins.grouped_attention import gpu_correctness

    case = gpu_correctness.Case(4, 2, 16, 8, torch.float32, ((20, 2), (0, 1)), 2, window=9, softcap=4.0, sinks=True,
                                rotary=8)
    rows = gpu_correctness.check(case, torch.device("cpu"), 80)
    assert [(row["kernel"], row["passed"]) for row in rows] == [("prefill", True), ("decode", True)]
    original = gpu_correctness.prefill
    monkeypatch.setattr(gpu_correctness, "prefill", lambda *a, **k: original(*a, **{**k, "window": k["window"] + 1}))
    assert [row["passed"] for row in gpu_correctness.check(case, torch.device("cpu"), 80)] == [False, True]


@pytest.mark.kernels
def test_far_end_of_a_cache_is_judged_by_its_last_head(monkeypatch) -> None:
    """The check of 64-bit addressing, at a size the CPU can hold; and its verdict when the last head is wrong."""
    from gqa_plugins.grouped_attention import gpu_correctness

    row = gpu_correctness.check_far(torch.device("cpu"), capacity=50, kv_heads=2, head=16)
    assert row["passed"], row
    original = gpu_correctness.grouped_query_attention

    def wrong(*arguments, **attributes):
        output, key, value = original(*arguments, **attributes)
        output[1, 0, -1] += 0.5
        return output, key, value

    monkeypatch.setattr(gpu_correctness, "grouped_query_attention", wrong)
    assert not gpu_correctness.check_far(torch.device("cpu"), capacity=50, kv_heads=2, head=16)["passed"]


def test_matrix_of_gpu_cases_holds_every_dtype_group_and_feature() -> None:
    from gqa_plugins.grouped_attention import gpu_correctness

    cases = list(gpu_correctness.cases())
    for dtype in gpu_correctness.DTYPES:
        some = [case for case in cases if case.dtype == dtype]
        assert any(case.window for case in some)
        assert any(case.softcap and case.sinks for case in some)
        assert any(case.rotary for case in some)
        assert {case.heads // case.kv_heads for case in some} >= {1, 3, 4, 7, 16, 64}
    assert len(cases) > len(list(gpu_correctness.cases(quick=True)))


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.kernels
@pytest.mark.parametrize("wrong", [False, True], ids=["right kernels", "wrong kernel"])
def test_whole_run_on_a_pretended_gpu_writes_its_files(script, monkeypatch, tmp_path, capsys, wrong: bool) -> None:
    """Kernels through the interpreter, with the CPU in the GPU's place; other tests have the stages without kernels
    (tests/evidence/test_gpu_stages.py). Its times mean nothing."""
    from evidence import gpu_stages
    from gqa_plugins.grouped_attention import gpu_bench, gpu_correctness

    def clock(calls) -> float:
        for call in calls:
            result = call()
            assert (result[0] if isinstance(result, tuple) else result).isfinite().all()
        return 0.5

    case = gpu_correctness.Case(4, 2, 16, 16, torch.float32, ((20, 1), (0, 0)), 1)
    monkeypatch.setattr(script, "why_not", lambda: None)
    monkeypatch.setattr(gpu_stages, "the_gpu", lambda: (torch.device("cpu"), "Pretended GPU", 90))
    monkeypatch.setattr(gpu_bench, "time_ms", clock)
    monkeypatch.setattr(gpu_bench, "ceilings", lambda device: {"copy_gb_s": 10.0, "matmul_tflop_s": 1.0})
    monkeypatch.setattr(gpu_bench, "points", lambda kind, quick: [(2, 40)] if kind == "decode" else [(1, 24)])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(
        total_memory=2**30, L2_cache_size=1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_correctness, "cases", lambda quick: [case])
    monkeypatch.setattr(gpu_correctness, "check_graph", lambda device: {"passed": True, "note": "not run"})
    monkeypatch.setattr(gpu_bench, "RAGGED", (40, 8))
    monkeypatch.setattr(gpu_stages, "shipping", lambda *_: {"shipping": [], "shipping_note": "not run"})
    monkeypatch.setattr(gpu_stages, "real_model", lambda *_: {"model": []})
    monkeypatch.setattr(gpu_stages.gpu_tools, "counters", lambda: {"notes": ["not run"]})
    monkeypatch.setattr(gpu_stages, "has_tensorrt", lambda: True)
    monkeypatch.setattr(gpu_stages, "engines", lambda options, copy_gb_s: [dict(ENGINE)])
    if wrong:
        monkeypatch.setattr(gpu_correctness, "decode", lambda *arguments, **attributes: None)
    code = script.main(["--quick", "--no-sanitizer", "--heads", "4", "--kv-heads", "2", "--head-size", "16", "--out",
                        str(tmp_path)])
    assert code == int(wrong)
    monkeypatch.setattr(gpu_stages, "engines", lambda options, copy_gb_s: [{**ENGINE, "passed": False}])
    assert script.main(["--only", "engines"]) == 1, "an engine that is wrong is a failure too"
    told = capsys.readouterr().out
    assert ("WRONG  decode" in told) == wrong
    assert "Pretended GPU: copy 10 GB/s" in told
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    counted = ("smoke", "correctness", "decode", "ragged", "prefill", "engines")
    assert [len(written[part]) for part in counted] == [2, 2, 1, 1, 1, 1]
    assert written["decode"][0]["peers"]["sdpa-math"] == 0.5
    assert set(written["prefill"][0]["peers"]) >= set(gpu_report.SDPA)
    assert written["command"].startswith("python scripts/gpu_check.py --quick")
    assert {fact["status"] for fact in written["stages"].values()} == {"done"}
    monkeypatch.setattr(gpu_correctness, "check", None)  # nothing is run again
    monkeypatch.setattr(gpu_bench, "measure", None)
    assert script.main(["--quick", "--no-sanitizer", "--resume", "--out", str(tmp_path)]) == int(wrong)
    assert json.loads((tmp_path / "gpu_check.json").read_text()) == written


@pytest.mark.kernels
def test_a_ragged_batch_is_measured_by_the_tokens_that_are_there(monkeypatch) -> None:
    """Every peer that is here computes the same: where a mask or a length is left out, garbage in the tail is NaN."""
    from gqa_plugins.grouped_attention import gpu_bench, gpu_peers

    seen: dict = {}
    monkeypatch.setattr(gpu_bench, "time_ms", lambda calls: seen.setdefault("ours", calls[0]()) is None or 2.0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(
        total_memory=2**30, L2_cache_size=1))

    def peers(sets, clock, *, math: bool) -> dict:
        seen.update(sets=sets, math=math)
        return {}

    monkeypatch.setattr(gpu_bench, "peers_of", peers)
    row = gpu_bench.measure_ragged((40, 8), 4, 2, 16, torch.float32, torch.device("cpu"), 10.0)
    assert row["gb_s"] == pytest.approx((40 + 8) * 2 * 2 * 16 * 4 / 2.0 / 1e6)
    assert not seen["math"]
    (one,) = seen["sets"]
    for tensor in (one.key, one.value):
        tensor[1, :, 8:] = 1e3  # masked: it must not be seen
    with gpu_peers.sdpa_kernel(gpu_peers.SDPBackend.MATH):
        outputs = []
        gpu_peers._sdpa("sdpa-math", [one], lambda calls: outputs.append(calls[0]()) or 1.0)
    plain = torch.nn.functional.scaled_dot_product_attention(
        one.query[1:], one.key[1:, :, :8], one.value[1:, :, :8], enable_gqa=True)
    assert (outputs[0][1:] - plain).abs().max() < 1e-5, "fp32, another order of sums"


def test_a_run_whose_ceilings_and_more_were_skipped_has_a_table_that_says_so(results) -> None:
    results["ceilings"] = {}
    results["stages"] = {"smoke": {"status": "done", "seconds": 9.0, "note": ""},
                         "bench core": {"status": "skipped", "seconds": 0.0, "note": "about 54 s, 3 s were left"}}
    text = gpu_report.table(results)
    assert text.startswith("Invented GPU: ceilings not measured\n")
    assert text.splitlines()[-1] == "bench core skipped: about 54 s, 3 s were left"
    page = gpu_report.markdown(results)
    assert "| bench core | skipped | 0.0 | about 54 s, 3 s were left |" in page


def test_results_of_another_card_are_not_resumed(script, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(script, "versions", lambda: {"torch": "0.0", "triton": "0.0"})
    chosen = SimpleNamespace(out=tmp_path, resume=True)
    row = {"case": "32/8x128 bf16", "kernel": "decode", "error": 1e-3, "allowed": 4e-3, "passed": True}
    gpu_report.write({**script.begin(chosen, "c", "card A"), "smoke": [row]}, tmp_path)
    assert script.begin(chosen, "c", "card A")["smoke"] == [row]
    assert script.begin(chosen, "c", "card B")["smoke"] == []
    assert script.begin(SimpleNamespace(out=tmp_path, resume=False), "c", "card A")["smoke"] == []


def test_script_runs_from_a_checkout_that_is_not_installed() -> None:
    program = (f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); sys.modules['gqa_plugins'] = None\n"
               "import gpu_check; gpu_check.alias_packages()\n"
               "from gqa_plugins.grouped_attention.plan import CAPABILITIES; print(CAPABILITIES)\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "121" in done.stdout


def test_script_knows_why_it_cannot_run(script, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "TRITON_INTERPRET" in script.why_not()
    assert {"python", "torch", "triton", "numpy", "transformers", "driver", "triton_key"} <= set(script.versions())


@pytest.mark.parametrize("l2_megabytes", [40, 50, 60, 126])
@pytest.mark.parametrize(("batch", "length"), [(1, 1024), (1, 8192), (4, 1024), (16, 32768)])
def test_caches_that_take_turns_do_not_stay_in_the_l2_cache(batch: int, length: int, l2_megabytes: int) -> None:
    """At (1, 1k) a cache is 4 MB: eight copies would all lie in an L2 cache of 50 MB, and its speed be measured."""
    from gqa_plugins.grouped_attention import gpu_bench

    cache_bytes, l2_bytes = 2 * batch * 8 * length * 128 * 2, l2_megabytes * 2**20
    copies = gpu_bench.copies_beyond_cache(cache_bytes, l2_bytes)
    assert 1 <= copies <= gpu_bench.MOST_COPIES
    assert copies * cache_bytes >= 2 * l2_bytes
    assert (copies - 1) * cache_bytes < 4 * l2_bytes, "no more than it takes"
