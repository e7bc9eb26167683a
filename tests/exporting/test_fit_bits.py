"""Bits of each matrix within a limit of the bundle's size, or of what rounding does to predictions."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import gqa_models
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from refusal import refused
from safetensors.numpy import load_file, save_file
from small_text import SENTENCES, byte_tokenizer

from gqa_export.bundle.quantization import PLAIN, BitsSearch, Quantization
from gqa_export.checkpoint.load_model import load_model
from gqa_export.checkpoint.open import open_checkpoint
from gqa_export.cli import main
from gqa_export.exporting.dry_run import dry_run
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import Export, export_onnx
from gqa_export.objects.export_options import export_options
from gqa_export.progress import silent
from gqa_export.quantizing import sensitivity
from gqa_export.quantizing.calibrate import rows_of_text
from gqa_export.quantizing.choose_bits import Upgrade, Upgrades
from gqa_export.quantizing.rtn import quantize_matrix
from gqa_export.validation.quantized_reference import put_quantized, requantized


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with text, whose predictions are sharp enough that rounding moves them."""
    folder = gqa_models.write_tiny("llama_tied", tmp_path_factory.mktemp("checkpoint") / "llama_tied")
    byte_tokenizer(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: 4 * values if values.ndim == 2 else values for name, values in tensors.items()},
              folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(SENTENCES) * 4)
    return path


def export(source: Path, folder: Path, **options: Any) -> Export:
    return export_onnx(source, folder, ExportOptions(**{"capacity": 64, "quantize": "int4", **options}))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def found(done: Export) -> tuple[Quantization, BitsSearch]:
    quantization = done.manifest.quantization
    assert quantization is not None
    assert quantization.search is not None
    return quantization, quantization.search


def test_upgrades_are_the_best_of_all_for_every_budget() -> None:
    random = np.random.default_rng(0)
    upgrades = [Upgrade(int(cost) * 96, float(gain)) for cost, gain in zip(random.integers(1, 9, 9), random.random(9))]
    upgrades.append(Upgrade(96, -1.0))
    table = Upgrades(upgrades)
    every = [subset for count in range(11) for subset in itertools.combinations(range(10), count)]
    for budget in (0, 95, 96, 500, 1000, 2500, 10**6):
        fitting = [sum(upgrades[i].gain for i in subset) for subset in every
                   if sum(upgrades[i].cost for i in subset) <= budget]
        chosen = table.within(budget)
        assert sum(upgrades[i].cost for i in chosen) <= budget
        assert sum(upgrades[i].gain for i in chosen) == pytest.approx(max(fitting))
    assert table.within(table.sparing(1.5)) == table.within(table.sparing(1.5))
    assert sum(upgrades[i].gain for i in table.within(table.sparing(1.5))) >= 1.5


def test_sizes_without_a_common_divisor_are_rounded_up_and_never_exceed_the_budget() -> None:
    random = np.random.default_rng(1)
    upgrades = [Upgrade(int(cost), float(gain)) for cost, gain in zip(random.integers(10**7, 10**8, 40),
                                                                      random.random(40))]
    table = Upgrades(upgrades)
    for share in (0.1, 0.5, 0.9):
        budget = int(share * table.whole)
        chosen = table.within(budget)
        assert 0.9 * budget < sum(upgrades[i].cost for i in chosen) <= budget


@pytest.mark.parametrize("target", ["ort", "onnx"])
def test_a_bundle_is_as_large_as_it_may_be_and_not_larger(checkpoint: Path, tmp_path: Path, target: str) -> None:
    """The ends are those of a limit nobody meets: all 4 bits, and all 8."""
    low = size((export(checkpoint, tmp_path / "low", head="same", target=target)).folder)
    high = size((export(checkpoint, tmp_path / "high", quantize="int8", target=target)).folder)
    limit = (low + high) // 2
    done = export(checkpoint, tmp_path / "b", max_size=limit, target=target)
    quantization, search = found(done)
    assert size(done.folder) <= limit
    bits = [weight.bits for weight in quantization.weights if weight.operator != PLAIN]
    assert set(bits) == {4, 8}
    assert search.higher == bits.count(8)
    # the errors that the manifest has are those of a quantizer's own codes, and no other matrix would have fitted in
    # place of one: the best of all choices of this size
    weights = load_file(checkpoint / "model.safetensors")
    for weight in quantization.weights:
        values = weights[weight.name if weight.name in weights else "model.embed_tokens.weight"]
        matrix = quantize_matrix(lambda start, stop, of=values: of[start:stop], values.shape, weight.bits, 32, "x")
        relative = ((matrix.dequantize() - values) ** 2).sum() / (values.astype(np.float64) ** 2).sum()
        assert weight.errors[str(weight.bits)] == pytest.approx(relative, rel=1e-4)
    rest = [weight for weight in quantization.weights if weight.bits == 4]
    assert size(done.folder) + min(weight.bytes for weight in rest) * 4 // 5 + 4096 > limit


def test_the_smallest_size_is_named_when_a_limit_cannot_be_met(checkpoint: Path, tmp_path: Path) -> None:
    with refused("E-OPTION-MAX-SIZE") as refusal:
        export(checkpoint, tmp_path / "b", max_size=10_000)
    assert not (tmp_path / "b").exists()
    least = int(refusal.error.fix.split()[1].replace(",", ""))
    done = export(checkpoint, tmp_path / "b", max_size=least)
    assert size(done.folder) <= least
    with refused("E-OPTION-MAX-SIZE"):
        export(checkpoint, tmp_path / "c", max_size=least - 1)
    assert not (tmp_path / "c").exists()


def test_a_limit_that_holds_everything_gives_eight_bits(checkpoint: Path, tmp_path: Path) -> None:
    quantization, _ = found(export(checkpoint, tmp_path / "b", max_size=1 << 40))
    assert {weight.bits for weight in quantization.weights} == {8}


def test_the_head_stays_as_it_was_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    low = size(export(checkpoint, tmp_path / "low").folder)
    quantization, search = found(export(checkpoint, tmp_path / "b", head="int8", max_size=low + 8192))
    head = next(weight for weight in quantization.weights if "layers" not in weight.name)
    assert (head.bits, head.errors) == (8, {})
    assert search.open == len(quantization.weights) - 1


def test_rules_fix_what_they_name_and_the_rest_is_chosen(checkpoint: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nmatch = "*.0.mlp.*"\nbits = 4\n[[rule]]\nmatch = "*v_proj*"\nbits = 0\n')
    quantization, search = found(export(checkpoint, tmp_path / "b", quantize=str(rules), max_size=1 << 40))
    bits = {weight.name: weight.bits for weight in quantization.weights}
    assert bits["model.layers.0.mlp.up_proj.weight"] == 4
    assert bits["model.layers.1.mlp.up_proj.weight"] == 8
    assert bits["model.layers.1.self_attn.v_proj.weight"] == 32
    assert search.open == sum(bool(weight.errors) for weight in quantization.weights) < len(quantization.weights)


def kl_of(folder: Path, checkpoint: Path, text: Path) -> float:
    """The KL divergence in fp64 of what the bundle's manifest says was made, on the tokens that were kept apart."""
    from gqa_export.bundle.manifest import read_manifest

    source = open_checkpoint(checkpoint)
    rows = rows_of_text(source, text, hold_out=True).apart
    plain, rounded = (load_model(source, "float64") for _ in range(2))
    put_quantized([rounded], requantized(source, read_manifest(folder), folder=folder))
    with torch.no_grad():
        a, b = (model(input_ids=rows).logits.log_softmax(-1) for model in (plain, rounded))
    return float((a.exp() * (a - b)).sum(-1).mean())


def test_the_divergence_is_measured_and_kept_below_its_limit(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    with refused("E-OPTION-MAX-KL") as refusal:
        export(checkpoint, tmp_path / "all", calibrate=text, max_kl=1e-9)
    ends = {"all": float(refusal.error.what.split("KL divergence of ")[1].split()[0])}
    ends["none"] = found(export(checkpoint, tmp_path / "none", calibrate=text, max_kl=1e3))[1].kl or 0.0
    assert not (tmp_path / "all").exists()
    assert ends["all"] < ends["none"]
    limit = (ends["all"] * ends["none"]) ** 0.5
    done = export(checkpoint, tmp_path / "b", calibrate=text, max_kl=limit)
    quantization, search = found(done)
    assert {weight.bits for weight in quantization.weights} == {4, 8}
    assert search.kl is not None
    assert search.kl <= limit
    # fp32 sums in PyTorch beside fp64, and a text of few tokens
    assert search.kl == pytest.approx(kl_of(done.folder, checkpoint, text), rel=2e-3, abs=1e-6)
    assert search.evaluations <= 7
    assert search.unit == "nats"
    again = export(checkpoint, tmp_path / "again", calibrate=text, max_kl=limit)
    assert again.manifest.quantization == quantization
    data = [(tmp_path / name / "model.onnx.data").read_bytes() for name in ("b", "again")]
    assert data[0] == data[1]


def test_tokens_that_are_measured_on_chose_no_scale(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(3000))))
    rows = rows_of_text(open_checkpoint(checkpoint), tmp_path / "text.txt", hold_out=True)
    statistics, apart = ({tuple(row) for row in each.tolist()} for each in (rows.statistics, rows.apart))
    assert statistics
    assert apart
    assert not statistics & apart
    assert not len(rows_of_text(open_checkpoint(checkpoint), tmp_path / "text.txt").apart)


def test_a_dry_run_shows_the_choice(checkpoint: Path, tmp_path: Path) -> None:
    low = size(export(checkpoint, tmp_path / "low", head="same").folder)
    plan = dry_run(checkpoint, ExportOptions(capacity=64, quantize="int4", max_size=low + 20_000))
    lines = "\n".join(plan.quantization)
    assert "bits chosen by error within" in lines
    assert "% with 8 bits" in lines
    done = export(checkpoint, tmp_path / "b", max_size=low + 20_000)
    assert tuple(found(done)[0].lines()) == plan.quantization


@pytest.mark.parametrize(("options", "code"), [
    ({"quantize": "int8", "max_size": 1 << 30}, "E-OPTION-LIMIT-BITS"),
    ({"quantize": "keep", "max_size": 1 << 30}, "E-OPTION-LIMIT-BITS"),
    ({"max_size": 1 << 30, "weights": "link"}, "E-OPTION-MAX-SIZE"),
    ({"max_kl": 0.1}, "E-OPTION-MAX-KL"),
    ({"max_kl": float("nan")}, "E-OPTION-MAX-KL"),
    ({"max_kl": -1.0}, "E-OPTION-MAX-KL")])
def test_limits_without_a_choice_are_refused(checkpoint: Path, tmp_path: Path, options: dict[str, Any],
                                             code: str) -> None:
    with refused(code):
        export(checkpoint, tmp_path / "b", **options)


def test_a_text_too_short_to_keep_some_apart_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a short text")
    with refused("E-FILE-TEXT-SHORT"):
        export(checkpoint, tmp_path / "b", calibrate=tmp_path / "short.txt", max_kl=0.1)


@pytest.mark.parametrize(("given", "size_"), [("100MB", 10**8), ("1.5GB", 15 * 10**8), ("800 MiB", 800 << 20),
                                              ("0.5gib", 1 << 29), (12345, 12345), (None, 0)])
def test_sizes_are_read_as_people_write_them(given: Any, size_: int) -> None:
    assert export_options("ort", "auto", None, None, "copy", None, "auto", None, False, None, False, False,
                          max_size=given).max_size == size_


@pytest.mark.parametrize("given", ["a lot", "100 potatoes", "-5MB", "0MB", "", 0, -1])
def test_what_is_no_size_is_refused_in_words(checkpoint: Path, tmp_path: Path, given: Any) -> None:
    with refused("E-OPTION-MAX-SIZE") as refusal:
        export_options("ort", "auto", None, None, "copy", None, "auto", None, False, None, False, False, max_size=given)
    assert "100MB" in refusal.error.fix


def test_the_command_takes_a_limit_and_says_what_it_chose(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["onnx", str(checkpoint), "-o", str(tmp_path / "b"), "--quantize", "int4", "--capacity", "64",
                 "--no-validate", "--max-size"]
    done = CliRunner().invoke(main, [*arguments, "1GB"])
    assert done.exit_code == 0, done.output
    assert "bits chosen by error within 1,000.0 MB" in done.output
    shutil.rmtree(tmp_path / "b")
    failed = CliRunner().invoke(main, [*arguments, "1KB"])
    assert failed.exit_code == 2
    assert not (tmp_path / "b").exists()


def test_a_manifest_of_an_earlier_release_is_still_read(checkpoint: Path, tmp_path: Path) -> None:
    from gqa_export.bundle.manifest import read_manifest

    done = export(checkpoint, tmp_path / "b")
    path = done.folder / "gqa_export.json"
    facts = json.loads(path.read_text())
    del facts["quantization"]["search"]
    for weight in facts["quantization"]["weights"]:
        del weight["errors"]
    path.write_text(json.dumps(facts))
    assert read_manifest(done.folder).quantization == done.manifest.quantization


@pytest.mark.parametrize("model", ["checkpoint", "mixtral"])
def test_what_layers_compute_is_not_kept_for_the_way_back(checkpoint: Path, tmp_path: Path, model: str,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """It is computed again, a layer at a time, and the gradients are the same to the last bit. Of a deep model it would
    be most of the memory that an export takes."""
    source = checkpoint if model == "checkpoint" else gqa_models.write_tiny(model, tmp_path / model)
    opened, calls = open_checkpoint(source), Counter[str]()
    names = {name for name, parameter in load_model(opened, "auto").named_parameters() if parameter.ndim > 1}
    rows = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(3))
    linear = torch.nn.functional.linear

    def counted(values: Any, weight: Any, bias: Any = None) -> Any:
        calls["grad" if torch.is_grad_enabled() else "no grad"] += 1
        return linear(values, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    found, again = sensitivity.sensitivities(opened, rows, names, {}, silent), calls.total()
    monkeypatch.setattr(sensitivity, "_compute_again", lambda model: None)
    calls.clear()
    kept = sensitivity.sensitivities(opened, rows, names, {}, silent)
    assert found.keys() == kept.keys()
    assert all(np.array_equal(found[name], kept[name]) for name in found)
    assert calls.total() < again < 2 * calls.total(), "the head's product is made once"
