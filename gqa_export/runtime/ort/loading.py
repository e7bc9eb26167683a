"""Opening a bundle in ONNX Runtime: which provider, which options, and whether the graph is what the manifest says.

Weights stay in their files, mapped by ONNX Runtime; with `low_memory` they are not prepacked either, so that their
pages are shared with the page cache and can be dropped (about 12 % slower decoding on a CPU).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ...bundle.graph_file import read_graph
from ...bundle.integrity import check_files
from ...bundle.manifest import MODEL, Manifest
from ...errors import GqaExportError, InvalidBundle, NotCheckedHere, cause_of
from ...graph_io import EXACT_PRODUCTS, TensorFact
from ...spec import DTYPES
from .huge_pages import for_what_is_filled

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
MOST_THREADS = 1024
"""the system has room for a few hundred thousand, and starting them takes it minutes"""
ORT_TYPES = {"tensor(int8)": "int8", "tensor(uint8)": "uint8",
             "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16",
             "tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(double)": "float64"}


def import_onnxruntime() -> Any:
    """The module onnxruntime; NotCheckedHere where it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise NotCheckedHere("onnxruntime is not installed", str(error),
                             "pip install 'gqa-export[ort]' (or 'gqa-export[gpu]' for an NVIDIA GPU)",
                             code="E-ENV-ONNXRUNTIME") from error
    return onnxruntime


def choose_provider(wanted: str, dtype: str, dtypes: Mapping[str, Sequence[str]]) -> str:
    """"cpu" or "cuda" for a wanted "auto", "cpu" or "cuda"; NotCheckedHere if it is not here or cannot run `dtype`.

    dtypes: per provider, what the target's kernels take. auto takes CUDA where it is there and can.
    """
    if wanted not in ("auto", *PROVIDERS):
        raise GqaExportError(f"unknown provider {wanted!r}", "--provider", f"use one of auto, {', '.join(PROVIDERS)}",
                             code="E-OPTION-PROVIDER")
    available = import_onnxruntime().get_available_providers()
    dtype = DTYPES.get(dtype, dtype)
    has_cuda = PROVIDERS["cuda"] in available
    provider = wanted if wanted != "auto" else "cuda" if has_cuda and dtype in dtypes.get("cuda", ()) else "cpu"
    if PROVIDERS[provider] not in available:
        raise NotCheckedHere(f"the {provider} provider of ONNX Runtime is not available here",
                             f"providers: {', '.join(available)}",
                             "pip install 'gqa-export[gpu]' without onnxruntime beside it, or pass --provider cpu",
                             code="E-ENV-PROVIDER")
    if dtype not in dtypes.get(provider, ()):
        fits = [name for name, good in DTYPES.items() if good in dtypes.get(provider, ())]
        raise NotCheckedHere(f"ONNX Runtime has no {dtype} kernels for this target on the {provider}",
                             f"dtype {dtype}, provider {provider}",
                             f"export with --dtype {fits[0] if fits else 'fp32'}, or choose another --provider",
                             code="E-ENV-KERNELS")
    return provider


def open_session(folder: Path | str, manifest: Manifest, provider: str, *, low_memory: bool = False,
                 threads: int = 0, config: dict[str, str] | None = None, graph: str = MODEL) -> Any:
    """An `onnxruntime.InferenceSession` on a graph of the bundle, held against its manifest.

    provider: "cpu" or "cuda", as `choose_provider` gave it. threads: intra-op threads, 0 lets ONNX Runtime choose.
    config: further session config entries. graph: the exact one, or that for long prompts.
    Raises GqaExportError for missing or changed files, an unreadable graph, or one that the manifest does not
    describe; NotCheckedHere for what this machine lacks.
    """
    folder = Path(os.path.abspath(folder))
    check_files(folder, manifest, hashes=False)
    ort = import_onnxruntime()
    check_needs(manifest, str(ort.__version__))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not 0 <= threads <= MOST_THREADS:
        raise GqaExportError(f"expected 0 to {MOST_THREADS} threads, got {str(threads)[:40]}", "--threads",
                             "leave it out, or give at most the number of cores", code="E-OPTION-THREADS")
    options.intra_op_num_threads = threads
    if low_memory:
        options.add_session_config_entry("session.disable_prepacking", "1")
    for key, value in {**session_config(manifest), **(config or {})}.items():
        options.add_session_config_entry(key, value)
    names = [PROVIDERS[provider]] + ([PROVIDERS["cpu"]] if provider != "cpu" else [])
    size = sum(fact.size for fact in manifest.files.values())
    try:
        with nullcontext() if low_memory else for_what_is_filled(size):
            session = ort.InferenceSession(str(folder / graph), options, providers=names)
    except Exception as error:  # onnxruntime's own exceptions share no public base class
        raise InvalidBundle(f"ONNX Runtime cannot open the graph: {cause_of(error)}", str(folder / graph),
                            "export the bundle again, or try --target portable", code="E-BUNDLE-OPEN") from error
    if PROVIDERS[provider] not in session.get_providers():
        raise NotCheckedHere(f"ONNX Runtime could not start {PROVIDERS[provider]}", "see its message above",
                             "check the CUDA and cuDNN libraries with `gqa-export doctor`, or pass --provider cpu",
                             code="E-ENV-PROVIDER")
    check_graph(manifest, [_fact(port) for port in session.get_inputs()],
                [_fact(port) for port in session.get_outputs()], str(folder / graph))
    return session


def check_needs(manifest: Manifest, version: str) -> None:
    """Hold the onnxruntime that is here against the one that a bundle needs.

    Raises:
        NotCheckedHere: it is older.
    """
    needed = manifest.needs.get("onnxruntime", "0")
    if _numbers(version) < _numbers(needed):
        raise NotCheckedHere(f"the bundle needs onnxruntime {needed} or later, and {version} is installed",
                             "needs in gqa_export.json", f"pip install 'onnxruntime>={needed}', or export it again "
                             "with the older one installed and without --ragged-chunks", code="E-ENV-VERSION")


def _numbers(version: str) -> tuple[int, ...]:
    """1.32.0 as (1, 32, 0); what follows the numbers is left out."""
    parts = itertools.takewhile(str.isdigit, version.split("+")[0].split("."))
    return tuple(int(part) for part in parts)


def session_config(manifest: Manifest) -> dict[str, str]:
    """The session options that a bundle is to be run with: `EXACT_PRODUCTS` where ONNX Runtime rounds no inputs by
    itself."""
    quantization = manifest.quantization
    return dict(EXACT_PRODUCTS) if quantization is not None and quantization.activations != "int8" else {}


def check_graph(manifest: Manifest, inputs: list[TensorFact], outputs: list[TensorFact], where: str) -> None:
    """Hold a graph's inputs and outputs against the manifest: names, types, and every literal dimension."""
    for kind, stated, found in (("input", manifest.inputs, inputs), ("output", manifest.outputs, outputs)):
        problem = _mismatch(stated, found)
        if problem:
            raise InvalidBundle(f"the graph's {kind}s differ from the manifest's: {problem}", where,
                                "model.onnx and gqa_export.json belong to different exports: export again",
                                code="E-BUNDLE-INTERFACE")


def _mismatch(stated: Iterable[TensorFact], found: list[TensorFact]) -> str:
    """What differs first, or ""."""
    wanted, got = {fact.name: fact for fact in stated}, {fact.name: fact for fact in found}
    for name in wanted.keys() - got.keys():
        return f"{name} is missing"
    for name in got.keys() - wanted.keys():
        return f"{name} is not in the manifest"
    for name, fact in wanted.items():
        if DTYPES.get(fact.dtype, fact.dtype) != got[name].dtype:
            return f"{name} is {got[name].dtype}, stated {fact.dtype}"
        pairs = list(zip(fact.shape, got[name].shape))
        if len(fact.shape) != len(got[name].shape) or any(_clash(a, b) for a, b in pairs):
            return f"{name} has shape {list(got[name].shape)}, stated {list(fact.shape)}"
    return ""


def _clash(stated: int | str, found: int | str) -> bool:
    """A named axis must be free in the graph, a literal one the same number."""
    return stated != found if isinstance(stated, int) else isinstance(found, int)


def _fact(port: Any) -> TensorFact:
    """ONNX Runtime's description of an input or output, in our words."""
    shape = tuple(size if isinstance(size, int) else str(size) for size in port.shape)
    return TensorFact(port.name, ORT_TYPES.get(port.type, port.type), shape)


def graph_facts(model: Path) -> tuple[list[TensorFact], list[TensorFact]]:
    """Inputs and outputs of an ONNX file, read without its weights; for callers that run the graph themselves."""
    graph = read_graph(model).graph
    initializers = {tensor.name for tensor in graph.initializer}
    inputs = [port for port in graph.input if port.name not in initializers]
    return [_onnx_fact(port) for port in inputs], [_onnx_fact(port) for port in graph.output]


def _onnx_fact(port: Any) -> TensorFact:
    from onnx import TensorProto

    kind = port.type.tensor_type
    names = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16",
             TensorProto.INT64: "int64", TensorProto.INT32: "int32", TensorProto.DOUBLE: "float64",
             TensorProto.INT8: "int8", TensorProto.UINT8: "uint8", TensorProto.FLOAT8E4M3FN: "float8_e4m3fn"}
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim)
    return TensorFact(port.name, names.get(kind.elem_type, str(kind.elem_type)), shape)
