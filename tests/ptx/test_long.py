"""The kernels for long prompts, compiled, on the interpreter of PTX, through the launches that the plugin makes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gqa_plugins.grouped_attention import launch, long_launch, workspace
from gqa_plugins.grouped_attention.launch import Layer, Sizes
from gqa_plugins.grouped_attention.long_layer import LongLayer

from .attention import DTYPES, Case, _bytes, compiled, make
from .global_memory import GlobalMemory

from long_cases import SETTINGS, Ran, assert_as_close_as_twice_eager, tables_of  # isort: skip  (found by .attention)

pytestmark = pytest.mark.kernels
RUNS = {
    "tiles, 8.0, bf16, over a past": ("tiles", 80, Case(((33, 40), (0, 5)), 40, 80, 2, 1, 16, 16, "bf16")),
    "hyper, 9.0, bf16, over a past": ("hyper", 90, Case(((33, 40), (0, 5)), 40, 80, 2, 1, 16, 16, "bf16")),
}


@pytest.mark.parametrize("name", RUNS)
def test_compiled_kernels_are_as_close_to_fp64_as_twice_eager(name: str) -> None:
    """No access outside a tensor, no race, every read of what was written: the interpreter refuses the rest."""
    method, capability, case = RUNS[name]
    problem, tables = make(case), tables_of(SETTINGS[method], case.kv_heads, case.head)
    layer = LongLayer(**vars(Layer(case.heads, case.kv_heads, case.head**-0.5, case.softcap, 0, 0, 0, 0, 0, 1)),
                      **SETTINGS[method].attributes())
    sizes = Sizes(len(case.lengths), case.steps, case.capacity, case.head, case.value_head, case.dtype,
                  projections=tables.projections.shape[1])
    wanted = launch.variants(layer, sizes)
    kernels = {kernel: compiled(wanted[kernel], capability) for kernel in ("append", *long_launch.KERNELS)}
    cubins = {kernel: cubin for kernel, (cubin, _) in kernels.items()}
    memory, output = GlobalMemory(), torch.full((sizes.batch, sizes.steps, layer.num_heads * sizes.value_head),
                                                torch.nan, dtype=DTYPES[sizes.dtype])
    read = {"query": problem.query, "key": problem.key, "value": problem.value, "past_lengths": problem.past_lengths,
            "new_lengths": problem.new_lengths, **vars(tables)}
    pointers = {key: memory.add(key, _bytes(tensor.contiguous()), readonly=True) for key, tensor in read.items()}
    for key, tensor in (("past_key", problem.past_key), ("past_value", problem.past_value), ("output", output)):
        pointers[key] = memory.add(key, _bytes(tensor))
    counts = long_launch.scratch_elements(SETTINGS[method], **workspace.long_shape(layer, sizes))
    address = start = memory.reserve(sum(workspace.aligned(4 * count) for count in counts))
    parts = [np.full(4 * count, 0xFF, np.uint8) for count in counts]
    for key, part in zip(("selection", "scratch"), parts, strict=True):
        memory.add(key, part, address=address)
        address += workspace.aligned(len(part))
    # The plugin looks at the rows of the decode kernel, which is not launched.
    launched = launch.launches(layer, sizes, {**cubins, "decode": cubins["long_prefill"], "prefill":
                                              cubins["long_prefill"]}, pointers, start, 4)
    assert [one.cubin.kernel for one in launched] == ["append", *long_launch.KERNELS]
    for one in launched:
        kernels[one.cubin.kernel][1].launch(one.grid, [value for _, value in one.arguments], memory)
    selection = torch.from_numpy(parts[0].view(np.int32)).view(sizes.batch, layer.kv_num_heads, -1)
    assert_as_close_as_twice_eager(Ran(replace(problem), SETTINGS[method], tables, output, selection))
