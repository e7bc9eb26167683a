"""The CPU in a GPU's place, for tests of what surrounds the kernels: stages, files, tables, launches, kills.

Every line of `scripts/gpu_check.py` runs but the kernels, the clock and the graph: the reference computes, the clock
shows a constant, and CUDA's driver is the stand-in of tests/cpp, which loads and launches what does nothing. No figure
and no verdict that comes out means anything.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

from evidence.checkout import ROOT

CARD, MILLISECONDS = "stub GPU: no figure means anything", 0.5
CEILINGS = {"copy_gb_s": 1000.0, "matmul_tflop_s": 100.0}


def build_stub_driver(folder: Path) -> Path:
    """libcuda.so.1 as tests/cpp has it, compiled without CMake. Raises CalledProcessError."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "c++")
    library = folder / "libcuda.so.1"
    subprocess.run([compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1",
                    f"-I{ROOT / 'plugins' / 'cpp'}", f"-I{ROOT / 'tests' / 'cpp'}",
                    str(ROOT / "tests" / "cpp" / "stub_cuda.cpp"), "-o", str(library)],
                   check=True, capture_output=True)
    return library


def make_context_current(library: Path) -> None:
    """What PyTorch does when it first uses a GPU. library: the stand-in."""
    driver, context = ctypes.CDLL(str(library)), ctypes.c_void_p()
    if driver.cuInit(0) or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) or driver.cuCtxSetCurrent(context):
        raise RuntimeError(f"{library} does not give a context")


@contextmanager
def in_place_of_a_gpu(check: ModuleType, library: Path, *, cases: int = 3, pause_s: float = 0.0,
                      compiled: bool = False) -> Iterator[None]:
    """While it lasts, `check` (the module gpu_check) finds a GPU.

    Args:
        check: the module of the script.
        library: what `build_stub_driver` made; its folder must be the first of LD_LIBRARY_PATH for the C++ harness.
        cases: of the correctness part that are kept.
        pause_s: how long every measurement sleeps, so that a kill can fall into it.
        compiled: the shipping path's kernels are really compiled; else files with their facts are made up.
    """
    import torch
    from gqa_plugins.grouped_attention import driver_ctypes, gpu_bench, gpu_correctness, grouped_query_attention

    from evidence import gpu_model, gpu_stages, shipping_path

    make_context_current(library)

    def clock(calls: Sequence[Callable[[], Any]]) -> float:
        time.sleep(pause_s)
        for call in calls:
            call()
        return MILLISECONDS

    def ceilings(_device: Any) -> dict[str, float]:
        time.sleep(pause_s)
        return dict(CEILINGS)

    def judged(case: Any, device: Any, _capability: int) -> list[dict[str, Any]]:
        time.sleep(pause_s)
        problem = gpu_correctness.make_problem(case, device)
        return [gpu_correctness.judge(case, kernel, problem.expected.to(case.dtype), problem)
                for kernel in ("prefill", "decode")]

    short = replace(gpu_correctness.Case(4, 2, 16, 16, torch.bfloat16, ((9, 1), (0, 1)), 1), rotary=8)
    tiny = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    reference = partial(_reference, grouped_query_attention)
    properties = SimpleNamespace(total_memory=2**31, L2_cache_size=1, multi_processor_count=4, major=9, minor=0)
    kernel_cases = [replace(short, dtype=dtype) for dtype in gpu_correctness.DTYPES] * cases
    answers = _Answers(shipping_path, compiled)
    changes: list[tuple[Any, dict[str, Any]]] = [
        (check, {"why_not": lambda: None}),
        (torch.cuda, {"get_device_properties": lambda *_: properties, "synchronize": lambda *_: None,
                      "empty_cache": lambda: None}),
        (gpu_bench, {"time_ms": clock, "ceilings": ceilings, "grouped_query_attention": reference,
                     "RAGGED": (64, 8, 8),
                     "points": lambda kind, quick: [(1, 32), (2, 64)] if kind == "decode" else [(1, 64), (1, 32)],
                     "device_facts": lambda _: (4, 90)}),
        (gpu_correctness, {"check": judged, "cases": lambda quick=False: iter(kernel_cases[:cases]),
                           "check_graph": lambda _: {"passed": True, "note": "not run"},
                           "check_far": lambda device: judged(short, device, 90)[0]}),
        (gpu_stages, {"the_gpu": lambda: (torch.device("cpu"), CARD, 90),
                      "CORE": {"decode": ((1, 32),), "prefill": ((1, 64),)},
                      "get_context": lambda _: get_context("fork"), "has_tensorrt": lambda: False}),
        (gpu_model, {"grouped_query_attention": reference, "SMALL": tiny, "LARGE": tiny, "LARGE_CAPACITY": 64,
                     "LARGE_PROMPT": 16, "capture": _capture, "clock": lambda run: clock([run])}),
        (driver_ctypes, {"opened": partial(driver_ctypes.opened, str(library))}),
        (shipping_path, {"CASES": {"decode": short, "prefill": replace(short, lengths=((9, 70), (0, 3)), steps=70)},
                         "make_problem": answers.make_problem, "files_of": answers.files_of,
                         "through_driver": answers.through_driver, "through_harness": answers.through_harness}),
    ]
    with ExitStack() as stack:
        for target, values in changes:
            for name, value in values.items():
                stack.enter_context(patch.object(target, name, value))
        stack.enter_context(patch.dict(os.environ, {"GQA_STUB_CAPABILITY": "90"}))
        yield


def _reference(attention: Callable[..., Any], *arguments: Any, **attributes: Any) -> Any:
    return attention(*arguments, **{**attributes, "backend": "reference"})


def _capture(step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """As a captured graph behaves: each replay runs the step and leaves its result in one place."""
    result = step().clone()

    def replay() -> None:
        result.copy_(step())

    return replay, result


class _Answers:
    """The shipping path with kernels that do nothing: what they should have computed is put in place afterwards."""

    def __init__(self, path: ModuleType, compiled: bool) -> None:
        self._problem: Any = None
        self._compiled = compiled
        self._make, self._files = path.make_problem, path.files_of
        self._driver, self._harness = path.through_driver, path.through_harness

    def make_problem(self, case: Any, device: Any) -> Any:
        self._problem = self._make(case, device)
        return self._problem

    def files_of(self, layer: Any, sizes: Any, capability: int, folder: Path | None) -> tuple[dict[str, bytes], str]:
        """Compiled files, or what their facts would be, with the text that the stand-in's modules are as their code."""
        from gqa_plugins.grouped_attention.cubin import Cubin, Variant
        from gqa_plugins.grouped_attention.launch import variants
        from gqa_plugins.grouped_attention.recipes import recipe

        def made_up(variant: Variant) -> Cubin:
            facts = recipe(variant, capability)
            arguments = tuple((name, kind.replace("T", variant.dtype).replace("C", variant.dtype))
                              for name, kind in facts.arguments)
            return Cubin(variant.kernel, f"{variant.kernel}_kernel", capability, 0, 32 * facts.warps, facts.tile_rows,
                         arguments, {name: str(int(value) if isinstance(value, bool) else value)
                                     for name, value in facts.constants.items()}, b"")

        if self._compiled:
            files, origin = self._files(layer, sizes, capability, folder)
            cubins = {name: Cubin.from_bytes(data) for name, data in files.items()}
        else:
            cubins, origin = {name: made_up(one) for name, one in variants(layer, sizes).items()}, "made up"
        texts = {name: " ".join([cubin.name, *(kind for _, kind in cubin.arguments)]) for name, cubin in cubins.items()}
        return {name: replace(cubin, code=texts[name].encode() + b"\0").to_bytes()
                for name, cubin in cubins.items()}, origin

    def through_driver(self, *arguments: Any) -> dict[str, Any]:
        return self._corrected(self._driver(*arguments))

    def through_harness(self, *arguments: Any) -> dict[str, Any]:
        return self._corrected(self._harness(*arguments))

    def _corrected(self, outcome: dict[str, Any]) -> dict[str, Any]:
        right = {"output": self._problem.expected, "past_key": self._problem.present_key,
                 "past_value": self._problem.present_value}
        return {name: right[name].to(tensor.dtype) for name, tensor in outcome.items()}
