"""The path that engines use, without TensorRT: compiled files, the driver launcher, the C++ harness, on one GPU.

The same data goes through `gqa_plugins.grouped_attention.driver` (by ctypes, and by cuda-bindings where that is
installed) and through gqa_attend, the plugin's own C++ launches. All must equal fp64 within twice eager's error, and
each other bit by bit. The compiled files are carried from the machine that makes engines (`write_kernels` there),
because another Triton compiles other code; without them they are compiled here, and the note says so.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gqa_plugins.grouped_attention import driver, driver_ctypes, fields, launch
from gqa_plugins.grouped_attention.cubin import SUFFIX, build, compile_variant
from gqa_plugins.grouped_attention.fields import Key
from gqa_plugins.grouped_attention.gpu_correctness import Case, Problem, judge, make_problem
from gqa_plugins.grouped_attention.launch import Layer, Sizes
from gqa_plugins.grouped_attention.validate import DTYPES

from evidence.checkout import ROOT

CPP = ROOT / "plugins" / "cpp"
SOURCES = ("gqa/core/*.cpp", "gqa/cuda/*.cpp", "gqa/attention/*.cpp", "harness/gqa_attend.cpp")
COMPILERS = ("c++", "g++", "clang++")
COMPILE_S, RUN_S = 60, 30
CASES = {"decode": Case(32, 8, 128, 128, torch.bfloat16, ((2047, 1), (0, 1), (700, 1)), 1, rotary=128),
         "prefill": Case(32, 8, 128, 128, torch.bfloat16, ((100, 48), (0, 33)), 48, rotary=128)}
Outcome = dict[str, torch.Tensor]


def layer_of(case: Case) -> tuple[Layer, Sizes]:
    """The plugin's layer and the shapes of its call."""
    layer = Layer(num_heads=case.heads, kv_num_heads=case.kv_heads, scale=case.head**-0.5, softcap=case.softcap,
                  window=case.window, rotary_interleaved=0, growing=0, has_rotary=int(case.rotary > 0),
                  has_sinks=int(case.sinks), has_new=1)
    capacity = max(past + new for past, new in case.lengths) + 5
    return layer, Sizes(len(case.lengths), case.steps, capacity, case.head, case.value_head, DTYPES[case.dtype],
                        case.rotary // 2, capacity if case.rotary else 1)


def write_kernels(folder: Path, capabilities: Sequence[int], jobs: int = 1) -> list[Path]:
    """Compile what the cases launch, for each capability (90 is 9.0), into files that are carried to the GPU."""
    wanted = dict.fromkeys(variant for case in CASES.values() for variant in launch.variants(*layer_of(case)).values())
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for (variant, capability), data in build(list(wanted), capabilities, jobs).items():
        paths.append(folder / f"{variant.name}.sm_{capability}{SUFFIX}")
        paths[-1].write_bytes(data)
    return paths


def files_of(layer: Layer, sizes: Sizes, capability: int, folder: Path | None) -> tuple[dict[str, bytes], str]:
    """(kernel -> compiled file, where they are from)."""
    variants = launch.variants(layer, sizes)
    carried = {name: folder / f"{variant.name}.sm_{capability}{SUFFIX}" for name, variant in variants.items()
               } if folder is not None else {}
    if carried and all(path.is_file() for path in carried.values()):
        return {name: path.read_bytes() for name, path in carried.items()}, "kernels as carried"
    import triton

    made = {name: compile_variant(variant, capability).to_bytes() for name, variant in variants.items()}
    missing = "no kernels carried" if folder is None else f"no kernels for {capability // 10}.{capability % 10} carried"
    return made, f"{missing}: compiled here, Triton {triton.__version__}"


@contextmanager
def launching_by(how: Callable[[], Any]) -> Iterator[None]:
    """Let `driver` make its calls through what `how` gives; what was loaded otherwise is not used again."""
    before, loaded = driver.bindings, dict(driver._LOADED)
    driver._LOADED.clear()
    driver.bindings = how
    try:
        yield
    finally:
        driver.bindings = before
        driver._LOADED.clear()
        driver._LOADED.update(loaded)


def stream_of(device: torch.device) -> int:
    """The stream that PyTorch's own work on the device is put on."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def wait_for(device: torch.device) -> None:
    """Until what was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def through_driver(layer: Layer, sizes: Sizes, keys: Sequence[Key], given: Mapping[str, torch.Tensor],
                   device: torch.device) -> Outcome:
    """Load and launch as an engine does, on PyTorch's memory. The caches of `given` are left as they are."""
    here = {name: tensor.clone() for name, tensor in given.items()}
    kernels = driver.load(keys)
    output = torch.full((sizes.batch, sizes.steps, layer.num_heads * sizes.value_head), torch.nan, device=device,
                        dtype=given["query"].dtype)
    workspace = torch.full((launch.workspace_bytes(layer, sizes),), 0xFF, device=device, dtype=torch.uint8)
    pointers = {name: tensor.data_ptr() for name, tensor in here.items()} | {"output": output.data_ptr()}
    for one in launch.launches(layer, sizes, kernels.cubins, pointers, workspace.data_ptr(), kernels.device.sm_count):
        driver.launch(one, kernels.functions[one.cubin.kernel], stream_of(device))
    wait_for(device)
    return {"output": output, "past_key": here["past_key"], "past_value": here["past_value"]}


def sources() -> list[Path]:
    """What gqa_attend is made of."""
    return [path for pattern in SOURCES for path in sorted(CPP.glob(pattern))]


def build_harness(folder: Path) -> tuple[Path | None, str]:
    """(gqa_attend, "") compiled from the checkout without CMake and without TensorRT; (None, why not)."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return None, f"no C++ compiler ({', '.join(COMPILERS)}): the harness was not run"
    program, until = folder / "gqa_attend", time.monotonic() + COMPILE_S

    def call(*words: str | Path) -> None:
        subprocess.run([compiler, *map(str, words)], capture_output=True, text=True, check=True,
                       timeout=max(until - time.monotonic(), 0.1))

    def compile_one(source: Path) -> Path:
        made = folder / f"{source.stem}.o"
        call("-std=c++17", "-O1", f"-I{CPP}", "-c", source, "-o", made)
        return made

    try:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, sources()))
        call(*objects, "-o", program, "-ldl", "-pthread")
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"the harness did not compile: {error}"[:200]
    except subprocess.CalledProcessError as error:
        return None, f"the harness did not compile: {next(iter(error.stderr.splitlines()), 'no message')}"[:200]
    return program, ""


def through_harness(program: Path, layer: Layer, sizes: Sizes, keys: Sequence[Key], container: bytes,
                    given: Mapping[str, torch.Tensor]) -> Outcome:
    """Run gqa_attend on the same data in a process of its own. Raises RuntimeError with what it said."""
    with TemporaryDirectory(prefix="gqa-harness-") as name:
        folder = Path(name)
        (folder / "layer").write_text(" ".join(map(str, (*astuple(layer), *astuple(sizes)))))
        (folder / "keys").write_bytes(fields.keys_text(keys))
        (folder / "cubins").write_bytes(container)
        for port, tensor in given.items():
            (folder / port).write_bytes(bytes_of(tensor))
        done = subprocess.run([str(program), str(folder)], capture_output=True, text=True, timeout=RUN_S)
        if done.returncode:
            raise RuntimeError(f"gqa_attend ended with {done.returncode}: {done.stderr.strip()}")
        shape = (sizes.batch, sizes.steps, layer.num_heads * sizes.value_head)
        like = {"output": given["query"].new_empty(shape), "past_key": given["past_key"],
                "past_value": given["past_value"]}
        return {port: torch.frombuffer(bytearray((folder / port).read_bytes()), dtype=tensor.dtype)
                .view(tensor.shape).to(tensor.device) for port, tensor in like.items()}


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The tensor's memory."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def ways() -> tuple[dict[str, Callable[[], Any]], list[str]]:
    """(how the driver can be called here, what cannot and why)."""
    found: dict[str, Callable[[], Any]] = {"ctypes": driver_ctypes.opened}
    try:
        from cuda.bindings import driver as bound

        bound.cuInit(0)
        found["cuda-bindings"] = lambda: bound
    except Exception as error:  # not installed, or of another driver: the message says which
        return found, [f"not launched by cuda-bindings: {type(error).__name__}: {str(error).splitlines()[0]}"[:200]]
    return found, []


def cache_is_right(case: Case, outcome: Outcome, problem: Problem) -> bool:
    """Whether the new tokens' keys and values are where they belong, to the rounding of a rotation."""
    for name, expected in (("past_key", problem.present_key), ("past_value", problem.present_value)):
        for b, (past, new) in enumerate(case.lengths):
            wrong = (outcome[name][b, :, :past + new].double() - expected[b, :, :past + new]).abs()
            if not bool((wrong <= 0.02 * expected[b, :, :past + new].abs() + 0.02).all()):  # bf16 keeps 8 bits
                return False
    return True


def check(name: str, device: torch.device, capability: int, carried: Path | None,
          program: Path | None, by: Mapping[str, Callable[[], Any]]) -> tuple[list[dict[str, Any]], str]:
    """(a row for each way through the case, where the kernels are from)."""
    case = CASES[name]
    layer, sizes = layer_of(case)
    files, origin = files_of(layer, sizes, capability, carried)
    keys = tuple(Key(kernel, capability, hashlib.sha256(data).hexdigest()) for kernel, data in files.items())
    container = fields.pack(files.values())
    fields.STORE.add(container)
    problem = make_problem(case, device)
    given = {port: tensor for port, tensor in problem.given.items() if tensor is not None}
    outcomes: dict[str, Outcome] = {}
    for way, how in by.items():
        with launching_by(how):
            outcomes[f"{name}, launched by {way}"] = through_driver(layer, sizes, keys, given, device)
    if program is not None:
        outcomes[f"{name}, C++ harness"] = through_harness(program, layer, sizes, keys, container, given)
    first = next(iter(outcomes.values()))
    rows = []
    for way, outcome in outcomes.items():
        row = judge(case, way, outcome["output"], problem)
        same = all(bytes_of(outcome[port]) == bytes_of(first[port]) for port in first)
        row["passed"] = row["passed"] and same and cache_is_right(case, outcome, problem)
        rows.append({**row, "same_bits": same})
    return rows, origin


def check_all(device: torch.device, capability: int, carried: Path | None) -> dict[str, Any]:
    """Rows of every case, and notes: where the kernels are from, why the harness was not run."""
    with TemporaryDirectory(prefix="gqa-attend-") as folder:
        program, reason = build_harness(Path(folder))
        by, notes = ways()
        notes += [reason] if reason else []
        rows: list[dict[str, Any]] = []
        for name in CASES:
            found, origin = check(name, device, capability, carried, program, by)
            rows += found
            notes.append(origin)
    for row in rows:
        if not row["passed"]:
            print(f"WRONG  {row['kernel']}  {row['case']}  error {row['error']:.3g} > {row['allowed']:.3g}, same bits "
                  f"{row['same_bits']}", file=sys.stderr, flush=True)
    return {"shipping": rows, "shipping_note": "; ".join(dict.fromkeys(notes))}
