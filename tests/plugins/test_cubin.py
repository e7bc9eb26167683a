"""Ahead-of-time compilation without a GPU: a slice of (model, capability, kernel); the full product is run by hand.

Compiling and interpreting exclude each other in a process, so each compilation here is a process of its own.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from gqa_plugins.grouped_attention import append, cubin, decode, plan, prefill, ptx_parameters, recipes
from refusal import refused

from gqa_export.errors import GqaExportError

MODELS = {
    "Llama-3-8B": {"heads": 32, "kv_heads": 8, "head": 128},
    "Qwen2.5-0.5B": {"heads": 14, "kv_heads": 2, "head": 64},
    "Gemma-3-270M": {"heads": 4, "kv_heads": 1, "head": 256, "windows": (False, True)},
    "SmolLM2": {"heads": 9, "kv_heads": 3, "head": 64},
}
ELF_CUDA = 190  # e_machine of a cubin


def run(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run([sys.executable, "-m", "gqa_plugins.grouped_attention.cubin", *arguments],
                          capture_output=True, text=True, env=environment)


def compiled(tmp_path: Path, *arguments: str) -> list[cubin.Cubin]:
    done = run(*arguments, "--jobs", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    return [cubin.Cubin.from_bytes(path.read_bytes(), str(path)) for path in sorted(tmp_path.iterdir())]


def shape(model: str) -> list[str]:
    sizes = MODELS[model]
    return ["--heads", str(sizes["heads"]), "--kv-heads", str(sizes["kv_heads"]), "--head-size", str(sizes["head"])]


SLICE = [("Llama-3-8B", 90, "bf16"), ("Qwen2.5-0.5B", 103, "fp16"), ("SmolLM2", 86, "fp32"),
         ("Gemma-3-270M", 80, "bf16")]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "capability", "dtype"), SLICE)
def test_model_compiles_into_files_that_say_how_to_launch(tmp_path, model: str, capability: int, dtype: str) -> None:
    files = compiled(tmp_path, *shape(model), "--dtype", dtype, "--capability", str(capability))
    assert sorted(one.kernel for one in files) == sorted(recipes.KERNELS)
    declared = {"append": append.ARGUMENTS, "prefill": prefill.ARGUMENTS, "decode": decode.ARGUMENTS,
                "combine": decode.COMBINE_ARGUMENTS}
    for one in files:
        assert one.code[:4] == b"\x7fELF"
        assert struct.unpack_from("<H", one.code, 18) == (ELF_CUDA,)
        assert one.name.encode() in one.code
        assert one.capability == capability
        assert one.shared_bytes <= plan.SHARED_KIB[capability] * 1024
        assert one.threads in (128, 256)
        assert one.scratch_pointers == 2
        assert [name for name, _ in one.arguments] == [name for name, _ in declared[one.kernel]]
        assert {kind for _, kind in one.arguments} <= {f"*{dtype}", "*fp32", "*i32", "*i64", "i32", "fp32"}
        assert int(one.constants["GROUP"]) == MODELS[model]["heads"] // MODELS[model]["kv_heads"]
        # No line information: neither this checkout's path nor a section for it.
        assert str(Path(cubin.__file__).parent).encode() not in one.code
        assert b".debug_line" not in one.code


@pytest.mark.slow
def test_decode_compiles_for_every_capability() -> None:
    program = ("from gqa_plugins.grouped_attention import cubin, plan\n"
               "variant = cubin.Variant('decode', 'bf16', 7, 64, 64, 7)\n"
               "for capability in plan.CAPABILITIES:\n"
               "    made = cubin.compile_variant(variant, capability)\n"
               "    print(capability, made.shared_bytes, len(made.code))\n")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert [int(line.split()[0]) for line in done.stdout.splitlines()] == list(plan.CAPABILITIES)


def test_variants_of_a_model_are_its_kernels_per_kind_of_window() -> None:
    variants = cubin.model_variants(dtype="bf16", **MODELS["Gemma-3-270M"])
    assert [(one.kernel, one.window) for one in variants] == [
        ("append", False), ("decode", False), ("prefill", False), ("decode", True), ("prefill", True),
        ("combine", False)]
    full = cubin.model_variants(heads=8, kv_heads=2, head=64, value_head=32, dtype="fp16", windows=(True,),
                                softcap=True, sinks=True, rotary_size=32, interleaved=True)
    assert [one.name for one in full] == [
        "append-fp16-g4-d64-e32-rotary32-interleaved", "decode-fp16-g4-d64-e32-r4-window-softcap",
        "prefill-fp16-g4-d64-e32-r128-window-softcap-sinks", "combine-fp16-g4-d64-e32-sinks"]


@pytest.mark.parametrize("kernel", ["append", "prefill", "decode", "combine"])
def test_declared_arguments_are_the_kernels_arguments(kernel: str) -> None:
    tiles = plan.Tiles(16, 16, 4, 1)
    wide = {"group": 2, "head": 16, "value_head": 16}
    attention = {**wide, "tiles": tiles, "window": True, "softcap": True}
    function, declared, constants = {
        "append": (append.append_kernel, append.ARGUMENTS + append.CODED_ARGUMENTS + append.FAULTS,
                   append.constants(**wide, rotary_half=4, interleaved=False, has_new=True)),
        "prefill": (prefill.prefill_kernel, prefill.ARGUMENTS + prefill.CODED_ARGUMENTS + append.FAULTS,
                    prefill.constants(**attention, sinks=True, split_band=True, ahead=False)),
        "decode": (decode.decode_kernel, decode.ARGUMENTS + decode.CODED_ARGUMENTS, decode.constants(**attention)),
        "combine": (decode.combine_kernel, decode.COMBINE_ARGUMENTS + append.FAULTS,
                    decode.combine_constants(group=2, value_head=16, sinks=True)),
    }[kernel]
    assert function.arg_names == [*(name for name, _ in declared), *constants]


def header(*kinds: str) -> str:
    lines = ",\n".join(f"\t.param .{kind} .ptr .global .align 1 kernel_param_{i}" for i, kind in enumerate(kinds))
    return f".visible .entry kernel(\n{lines}\n)\n.reqntid 128\n{{\n\tld.param.u64 %rd1, [kernel_param_0];\n}}\n"


@pytest.mark.parametrize("hidden", [(), ("u64",), ("u64", "u64"), ("b64", "b64")])
def test_hidden_pointers_are_counted_not_assumed(hidden: tuple[str, ...]) -> None:
    declared = ("*bf16", "*i32", "i32", "fp32")
    assert ptx_parameters.scratch_pointers(header("u64", "u64", "u32", "f32", *hidden), declared, "k") == len(hidden)


@pytest.mark.parametrize("found", [
    ("u64", "u64", "u32", "f32", "u64", "u64", "u64"),  # a third hidden pointer
    ("u64", "u64", "u32", "f32", "u64", "u32"), ("u64", "u64", "u32", "f32", "f32"),  # hidden, and not a pointer
    ("u64", "u64", "u32"), (),  # one that is declared was dropped
    ("u64", "u64", "f32", "u32"), ("u64", "u32", "u32", "f32")])  # in another order, of another type
def test_kernel_that_takes_other_parameters_than_declared_is_refused(found: tuple[str, ...]) -> None:
    with refused("E-ENGINE-KERNEL-ARGUMENTS") as caught:
        ptx_parameters.scratch_pointers(header(*found), ("*bf16", "*i32", "i32", "fp32"), "kernel decode")
    assert caught.error.where == "kernel decode"


def made() -> cubin.Cubin:
    return cubin.Cubin("decode", "decode_kernel", 90, 50000, 128, 16, (("query_ptr", "*bf16"), ("scale", "fp32")),
                       {"GROUP": "4", "PRECISION": "ieee"}, b"\x7fELF\n\n\x00code")


def test_file_reads_back_as_it_was_written() -> None:
    assert cubin.Cubin.from_bytes(made().to_bytes()) == made()
    lines = made().to_bytes().partition(b"\n\n")[0].decode().split("\n")
    assert lines[0] == "gqa-cubin 1"
    assert "argument query_ptr *bf16" in lines
    assert "scratch_pointers 2" in lines
    assert "code_bytes 11" in lines


@pytest.mark.parametrize(("damage", "said"), [
    (lambda data: b"ELF" + data, "does not begin with"),
    (lambda data: data[:40], "does not begin with"),
    (lambda data: data[:-1], "cut short or altered"),
    (lambda data: data[:-1] + b"x", "cut short or altered"),
    (lambda data: data.replace(b"threads 128", b"threads many"), "incomplete"),
    (lambda data: data.replace(b"capability 90\n", b""), "incomplete"),
])
def test_damaged_file_is_refused_with_the_remedy(damage, said: str) -> None:
    with refused("E-ENGINE-KERNEL-FILE") as caught:
        cubin.Cubin.from_bytes(damage(made().to_bytes()), "some.gqacubin")
    assert said in caught.error.what
    assert caught.error.where == "some.gqacubin"
    assert "cubin --help" in caught.error.fix


@pytest.mark.parametrize(("text", "number"), [("8.9", 89), ("89", 89), ("sm_120", 120), ("10.3", 103), ("12.1", 121)])
def test_capability_is_read_as_people_write_it(text: str, number: int) -> None:
    assert cubin.parse_capability(text) == number


@pytest.mark.parametrize("text", ["7.5", "sm_75", "ninety", ""])
def test_capability_that_is_not_compiled_for_is_refused(text: str) -> None:
    with refused("E-OPTION-CAPABILITY"):
        cubin.parse_capability(text)


@pytest.mark.parametrize(("changes", "where"), [
    ({"heads": 5}, "--heads"), ({"dtype": "fp8"}, "--dtype"), ({"head": 512}, "--head-size"),
    ({"value_head": 0}, "--value-head-size"), ({"rotary_size": 3}, "--rotary-size"),
    ({"rotary_size": 128}, "--rotary-size"),
])
def test_shape_that_no_kernel_has_is_refused_before_compiling(changes: dict, where: str) -> None:
    with pytest.raises(GqaExportError) as caught:
        cubin.model_variants(**{"heads": 4, "kv_heads": 2, "head": 64, "dtype": "fp16", **changes})
    assert caught.value.where == where


def test_unknown_kernel_capability_and_an_interpreting_process_are_refused() -> None:
    variant = cubin.Variant("decode", "fp16", 4, 64, 64, 4)
    with refused("E-OPTION-CAPABILITY"):
        cubin.compile_variant(variant, 75)
    with refused("E-ENV-TRITON-INTERPRET") as caught:
        cubin.compile_variant(variant, 90)
    assert "TRITON_INTERPRET" in caught.error.where
    with refused("E-ENGINE-KERNEL-UNKNOWN"):
        recipes.recipe(cubin.Variant("sparse", "fp16", 4, 64, 64, 4), 90)


def test_command_line_refuses_in_three_lines_with_exit_code_2(tmp_path) -> None:
    done = run("--heads", "5", "--kv-heads", "2", "--head-size", "64", "--dtype", "fp16", "--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: 5 query heads cannot be grouped over 2 key/value heads\n  at:  --heads\n")
    assert done.stderr.splitlines()[2].startswith("  fix: ")
    assert not list(tmp_path.iterdir())


def test_help_shows_an_example() -> None:
    done = run("--help")
    assert done.returncode == 0
    for text in ("--capability", "--rotary-size", "example:", "no GPU is needed"):
        assert text in done.stdout
