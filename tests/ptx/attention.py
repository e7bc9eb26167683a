"""The whole operator through compiled PTX: the launches that the plugin makes, on the interpreter, against fp64.

Problems and the allowed error are those of the interpreter tests (tests/plugins/attention_cases.py): twice the error of
eager attention in the same precision, plus 1e-6. Everything unspecified is NaN, and so are outputs and workspace.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from gqa_plugins.grouped_attention import launch, plan, workspace
from gqa_plugins.grouped_attention.coded_layer import CodedLayer
from gqa_plugins.grouped_attention.cubin import Cubin, Variant, compile_to_ptx
from gqa_plugins.grouped_attention.launch import Layer, Sizes

from gqa_export.attention_op import CACHE_CODES, RING

from .global_memory import GlobalMemory
from .machine import Machine

PLUGIN_TESTS = str(Path(__file__).resolve().parent.parent / "plugins")
if PLUGIN_TESTS not in sys.path:  # that folder is not a package: its modules import each other by name
    sys.path.append(PLUGIN_TESTS)
from attention_cases import (  # noqa: E402
    DTYPES,
    SCALES,
    Case,
    Problem,
    assert_cache_holds_new_codes,
    assert_cache_holds_new_tokens,
    assert_ring_holds_new_tokens,
    coded,
    eager,
    make,
    ring_of,
    truth,
    truth_of_codes,
)

SM_COUNT = 4
Compiled = tuple[Cubin, Machine]
Library = Callable[[Variant, int], Compiled]


@dataclass(frozen=True)
class Run:
    """A case on one capability. rows: that the tile is chosen for (0: as an engine's kernels are compiled); programs:
    of decode; has_new: False for a layer that reads another layer's cache; slots: of a ring, 0 where the cache keeps
    all; cache: of codes, a name of CACHE_CODES."""

    case: Case
    capability: int
    kind: str
    programs: int = 2
    least_keys: int = 1
    has_new: bool = True
    rows: int = 0
    slots: int = 0
    cache: str = ""


@functools.cache
def compiled(variant: Variant, capability: int, approximate: bool = False) -> Compiled:
    """A kernel, compiled once per process."""
    cubin, ptx = compile_to_ptx(variant, capability)
    return cubin, Machine(ptx, cubin.shared_bytes, approximate=approximate)


def layer_of(run: Run) -> tuple[Layer, Sizes]:
    """The plugin's layer and the shapes of its call."""
    case = run.case
    layer = Layer(case.heads, case.kv_heads, case.head**-0.5, case.softcap, case.window, int(case.interleaved),
                  RING if run.slots else 0, int(case.rotary > 0), int(case.sinks), int(run.has_new))
    if run.cache:
        layer = CodedLayer(*astuple(layer), CACHE_CODES[run.cache], *SCALES[run.cache])
    return layer, Sizes(len(case.lengths), case.steps, run.slots or case.capacity, case.head, case.value_head,
                        case.dtype, case.rotary // 2, case.capacity if case.rotary else 1)


def variants_of(run: Run) -> dict[str, Variant]:
    """The kernels that the run launches, by name."""
    layer, sizes = layer_of(run)
    every = launch.variants(layer, sizes)
    wanted = ["decode", "combine"] if run.kind == "decode" else ["prefill"]
    found = {name: every[name] for name in ("append", *wanted) if name in every}
    if run.rows:
        found[run.kind] = replace(found[run.kind], rows=run.rows)
    return found


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(-1).view(torch.uint8).numpy()


def attend(run: Run, problem: Problem, library: Library = compiled) -> torch.Tensor:
    """Launch what the plugin launches; the output [B, S, H*E]. The caches are written in place. Raises Fault."""
    layer, sizes = layer_of(run)
    kernels = {name: library(variant, run.capability) for name, variant in variants_of(run).items()}
    memory = GlobalMemory()
    given = {"query": problem.query, "past_lengths": problem.past_lengths, "new_lengths": problem.new_lengths,
             "cos": problem.cos, "sin": problem.sin, "sinks": problem.sinks}
    if run.has_new:
        given |= {"key": problem.key, "value": problem.value}
    pointers = {name: memory.add(name, _bytes(tensor), readonly=True)
                for name, tensor in given.items() if tensor is not None}
    output = torch.full((sizes.batch, sizes.steps, layer.num_heads * sizes.value_head), torch.nan,
                        dtype=DTYPES[sizes.dtype])
    for name, tensor in (("past_key", problem.past_key), ("past_value", problem.past_value), ("output", output)):
        pointers[name] = memory.add(name, _bytes(tensor), readonly=name != "output" and not run.has_new)
    scratch = _workspace(memory, layer, sizes, run, kernels["decode"][0].tile_rows if run.kind == "decode" else 1)
    not_launched = SimpleNamespace(tile_rows=1)  # the plugin looks at the rows of both attention kernels
    cubins: dict[str, Any] = {"prefill": not_launched, "decode": not_launched,
                              **{name: cubin for name, (cubin, _) in kernels.items()}}
    programs = run.programs if run.kind == "decode" else 1
    with patch.object(launch, "choose", lambda *_: (run.kind, programs)), \
            patch.object(plan, "LEAST_KEYS", run.least_keys):
        launched = launch.launches(layer, sizes, cubins, pointers, scratch, SM_COUNT)
    for one in launched:
        machine = kernels[one.cubin.kernel][1]
        machine.launch(one.grid, [value for _, value in one.arguments], memory)
    return output


def _workspace(memory: GlobalMemory, layer: Layer, sizes: Sizes, run: Run, tile_rows: int) -> int:
    """Rotated queries, partial outputs, their log-sum-exps and where a row's begin and end, as the plugin lays them
    out, exactly as long as they are used: an access past the end of one is in no allocation. All NaN."""
    size = plan.DTYPE_BYTES[sizes.dtype]
    rotated = sizes.batch * sizes.steps * layer.num_heads * sizes.head * size if layer.has_rotary else 0
    elements = plan.workspace_elements(sizes.batch, sizes.steps, layer.num_heads, layer.kv_num_heads, sizes.value_head,
                                       tile_rows, run.programs)
    faults = 4 * sizes.batch * layer.kv_num_heads * -(-sizes.steps // 16) if run.cache and run.has_new else 0
    parts = {"rotated": rotated, "faults": faults}
    if run.kind == "decode":
        parts |= {"partial": 4 * elements[0], "logsum": 4 * elements[1], "ranges": 8 * elements[2]}
    address = start = memory.reserve(sum(map(workspace.aligned, parts.values())))
    for name, part in parts.items():
        if part:
            memory.add(name, np.full(part, 0xFF, np.uint8), address=address)
        address += workspace.aligned(part)
    return start


def problem_of(run: Run) -> Problem:
    """Inputs from the case's own seed. Where nothing is new, the cache holds the tokens already."""
    problem = make(run.case)
    if not run.has_new:
        _, present_key, present_value = truth(problem)
        problem.past_key.copy_(present_key)
        problem.past_value.copy_(present_value)
        problem.key = problem.value = None  # type: ignore[assignment]
    return problem


@dataclass(frozen=True)
class Result:
    """How far the output is from fp64, and how far it may be."""

    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Within what is allowed."""
        return self.error <= self.allowed


def check(run: Run, library: Library = compiled) -> Result:
    """Run it and compare: NaN exactly where fp64 has NaN, padded rows zero, the cache as it must be. Raises Fault or
    AssertionError."""
    if run.cache:
        return check_codes(run, library)
    problem = problem_of(run)
    before_key, before_value = problem.past_key.clone(), problem.past_value.clone()
    expected, present_key, present_value = truth(problem)
    allowed = 2 * (eager(problem, present_key, present_value).double() - expected).abs().max().item() + 1e-6
    held = ring_of(problem, run.slots) if run.slots else problem
    before = ring_of(problem, run.slots) if run.slots else None
    output = attend(run, held, library).double()
    assert torch.equal(output.isnan(), expected.isnan()), "NaN in other places than in fp64"
    for b, (_, new) in enumerate(run.case.lengths):
        assert (output[b, new:] == 0).all(), f"a padded row of sequence {b} is not zero"
    if before is not None:
        assert_ring_holds_new_tokens(held, before, problem)
    elif run.has_new:
        assert_cache_holds_new_tokens(problem, before_key, before_value)
    else:
        for now, then in ((problem.past_key, before_key), (problem.past_value, before_value)):
            assert torch.equal(now.view(torch.int16 if now.element_size() == 2 else torch.int32),
                               then.view(torch.int16 if now.element_size() == 2 else torch.int32)), "cache changed"
    return Result((output - expected).abs().max().item(), allowed)


def check_codes(run: Run, library: Library = compiled) -> Result:
    """The same over a cache of codes: those that are written are the rule's but for ties, no other changes, and the
    output is that of fp64 over the codes that are there."""
    problem = coded(make(run.case), run.cache)
    before = problem.past_key.clone(), problem.past_value.clone()
    output = attend(run, problem, library).double()
    assert_cache_holds_new_codes(problem, before)
    expected, allowed = truth_of_codes(problem)
    assert torch.equal(output.isnan(), expected.isnan()), "NaN in other places than in fp64"
    for b, (_, new) in enumerate(run.case.lengths):
        assert (output[b, new:] == 0).all(), f"a padded row of sequence {b} is not zero"
    return Result((output - expected).nan_to_num().abs().max().item(), allowed)
