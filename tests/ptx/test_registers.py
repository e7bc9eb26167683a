"""What ptxas says of the kernels: no spilled registers, no wgmma that it had to serialise. No GPU is needed."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from gqa_plugins.grouped_attention import long_launch, plan
from gqa_plugins.grouped_attention.cubin import Variant, compile_to_ptx

from gqa_export.long_attention_op import DEFAULTS, PROJECTIONS

pytestmark = [pytest.mark.kernels, pytest.mark.slow]
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
NEWER = 90  # from here on Triton has a newer ptxas, and the code runs on one capability alone


@dataclass(frozen=True)
class Assembled:
    """What `ptxas -v` prints of one kernel."""

    stack_bytes: int
    spilled_bytes: int
    serialised: bool


def assemble(variant: Variant, capability: int, folder: Path) -> Assembled:
    """Run the ptxas that Triton runs, and read what it prints."""
    import triton

    assembler = triton.knobs.nvidia.ptxas_blackwell if capability >= NEWER else triton.knobs.nvidia.ptxas
    text, made = folder / "kernel.ptx", folder / "kernel.cubin"
    text.write_text(compile_to_ptx(variant, capability)[1])
    name = f"sm_{capability}{'a' if capability >= NEWER else ''}"
    done = subprocess.run([assembler.path, "-v", f"--gpu-name={name}", text, "-o", made], capture_output=True,
                          text=True, check=True)
    stack, stores, loads = map(int, STACK.search(done.stderr).groups())  # type: ignore[union-attr]
    return Assembled(stack, stores + loads, "serialized" in done.stderr)


def variant(kernel: str, dtype: str, head: int, features: bool) -> Variant:
    return Variant(kernel, dtype, 4, head, head, 4 if kernel == "decode" else plan.LONG_ROWS, features, features,
                   features and kernel == "prefill")


@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_no_register_is_spilled_up_to_head_size_128(capability: int, head: int, tmp_path: Path) -> None:
    """Plain and with window, soft cap and sinks; in turn bf16 and fp16, whose code differs in conversions alone."""
    for number, (kernel, features) in enumerate((("prefill", False), ("prefill", True), ("decode", False))):
        one = variant(kernel, ("bf16", "fp16")[(number + capability + head // 64) % 2], head, features)
        assembled = assemble(one, capability, tmp_path)
        assert assembled.stack_bytes == assembled.spilled_bytes == 0, f"{one.name}: {assembled}"
        assert not assembled.serialised, one.name


@pytest.mark.parametrize(("method", "capability"), [("tiles", 89), ("hyper", 90)])
def test_no_register_is_spilled_for_long_prompts_at_head_size_128(method: str, capability: int, tmp_path: Path) -> None:
    """With the defaults of `--long-attention`; each method at one capability, for the time that compiling takes."""
    setting = DEFAULTS[method]
    one = Variant("long_prefill", "bf16", 4, 128, 128, long_launch.rows_of("long_prefill", setting, 4), long=setting,
                  projections=PROJECTIONS)
    assembled = assemble(one, capability, tmp_path)
    assert assembled.stack_bytes == assembled.spilled_bytes == 0, assembled


@pytest.mark.parametrize("capability", [86, 87, 103, 110, 121])
def test_no_register_is_spilled_on_the_capabilities_beside_those(capability: int, tmp_path: Path) -> None:
    """Where most registers are wanted: head size 128 with window, soft cap and sinks."""
    for number, kernel in enumerate(("prefill", "decode")):
        one = variant(kernel, ("bf16", "fp16")[(number + capability) % 2], 128, True)
        assembled = assemble(one, capability, tmp_path)
        assert assembled.stack_bytes == assembled.spilled_bytes == 0, f"{one.name}: {assembled}"
        assert not assembled.serialised, one.name


def test_every_capability_is_looked_at() -> None:
    looked_at = {number for test in (test_no_register_is_spilled_up_to_head_size_128,
                                     test_no_register_is_spilled_on_the_capabilities_beside_those)
                 for mark in test.pytestmark if mark.args[0] == "capability" for number in mark.args[1]}
    assert looked_at == set(plan.CAPABILITIES)


def order(chosen: Variant, folder: Path) -> str:
    """Products (G), exponentials (e), waits for products (W) and branches (|) of a kernel for 9.0, as they are in the
    machine code."""
    import triton

    file = folder / "kernel.cubin"
    file.write_bytes(compile_to_ptx(chosen, 90)[0].code)
    done = subprocess.run([triton.knobs.nvidia.nvdisasm.path, "-c", file], capture_output=True, text=True, check=True)
    found = re.findall(r"\b(HGMMA|MUFU\.EX2|WARPGROUP\.DEPBAR|BRA)\b", done.stdout)
    return "".join({"HGMMA": "G", "MUFU.EX2": "e", "WARPGROUP.DEPBAR": "W", "BRA": "|"}[name] for name in found)


@pytest.mark.parametrize(("head", "features"), [(64, False), (128, False), (128, True)])
def test_prefill_that_works_ahead_has_products_beside_its_softmax(head: int, features: bool, tmp_path: Path) -> None:
    """Between the first product of a loop and the wait for it: exponentials, most of a tile's."""
    made = variant("prefill", "bf16", head, features)
    interleaved = re.compile(r"G(?=[^W|]*e{3})[^W|]*W")
    ahead, in_turn = order(made, tmp_path), order(replace(made, ahead=False), tmp_path)
    most = max(run.count("e") for run in interleaved.findall(ahead))
    assert most >= 16, ahead
    assert not interleaved.findall(in_turn), in_turn


def test_prefill_that_works_in_turn_can_be_chosen_and_does_not_spill(tmp_path: Path) -> None:
    for head in (64, 128):
        made = replace(variant("prefill", "bf16", head, False), ahead=False)
        assembled = assemble(made, 90, tmp_path)
        assert assembled.stack_bytes == assembled.spilled_bytes == 0, f"{made.name}: {assembled}"
        assert not assembled.serialised


@pytest.mark.parametrize("capability", [89, 90, 120])
def test_fp32_decode_keeps_its_registers(capability: int, tmp_path: Path) -> None:
    """It is multiplied outside the tensor cores: 32 keys of 128 features did not fit, and 328 bytes were spilled."""
    assert assemble(variant("decode", "fp32", 128, False), capability, tmp_path).stack_bytes <= 16
