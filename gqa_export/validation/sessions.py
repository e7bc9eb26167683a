"""The sessions of a comparison: PyTorch in fp64 (the reference), PyTorch in the bundle's number format (the same-dtype
baseline), and the bundle in ONNX Runtime, its calls made by Polygraphy's runner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.manifest import Manifest
from ..bundle.quantization import KEPT
from ..checkpoint.load_model import load_model
from ..compare.tolerance import EPSILON, FLOOR_ULPS
from ..errors import GqaExportError, InvalidCheckpoint, NotCheckedHere
from ..graph_io import HIDDEN_STATES
from ..quantized.kv_codes import MOST_TIE, TIE, limits
from ..runtime.session import Session
from ..spec import KvCache, WindowCache

FillGarbage = Callable[[tuple[float, ...]], None]
"""fills the part of the cache beyond the lengths with these values before every later call; (): leaves it as it is"""


FP8_UNITS = 16
"""an 8-bit float of 3 bits of mantissa is at most this many of its own units"""
SMALL_BYTES = 1 << 25
"""models below this run on one thread: several threads wait for one another longer than they work"""


@dataclass
class Sessions:
    """What is compared. eager None: there was no room for it. fill_garbage None: the bundle's cache cannot be
    reached, and the case `garbage_tail` is not run."""

    reference: Session
    eager: Session | None
    bundle: Session
    fill_garbage: FillGarbage | None = None
    beside: bool = False
    """run the three at the same time, in threads: worth it for large models"""
    alike: frozenset[int] | None = None
    """numbers of the layers whose keys, values and cache are compared (`cached_layers`); None: all"""
    follow: bool = False
    """the cache is quantized: PyTorch takes the bundle's codes where they are as right as its own"""
    count_codes: bool = False
    """count the codes of the bundle that are not nearest to the reference's numbers, taken or not"""
    windows: tuple[WindowCache, ...] = ()
    """rings of the bundles: what they hold no longer is not compared"""
    by_rule: bool = False
    """the baseline rounds its activations as the bundle does, and outputs are compared with its, too"""
    hidden: bool = True
    """hidden states are compared where the sessions give them"""


def pytorch_sessions(checkpoint: Any, manifest: Manifest, ran_dtype: str,
                     notes: list[str]) -> tuple[Any, Session | None, str]:
    """PyTorch's sessions over an opened checkpoint: the reference, the same-dtype baseline, the reference's number
    format.

    ran_dtype: "float32" for a bf16 bundle means its fp32 twin, which holds the bundle's rounded weights: so does its
    reference then. Models are loaded in each format, not cast to it: a cast would round the rotary frequencies too.
    Raises NotCheckedHere where not even two fp32 models fit in memory.
    """
    import psutil

    from ..runtime.torch_session import TorchSession

    model = load_model(checkpoint, manifest.dtype if ran_dtype != manifest.dtype else "float32")
    numbers, room = sum(parameter.numel() for parameter in model.parameters()), psutil.virtual_memory().available
    if numbers * 8 > room:
        raise NotCheckedHere(f"the comparison needs {numbers * 8 / 1e9:.0f} GB of memory, {room / 1e9:.0f} are free",
                             checkpoint.source, "validate on a machine with more memory", code="E-VALIDATE-MEMORY")
    # fp64 shares what the checkpoint holds; matrices that are quantized once more, and the values of kept codes in the
    # fp32 twin, are fp64 beside the baseline's fp32
    method = "" if manifest.quantization is None else manifest.quantization.method
    quantized = bool(method) and (method not in KEPT or (method == KEPT[0] and ran_dtype != manifest.dtype))
    needed = numbers * (16 if quantized else 8)
    reference_dtype = "float64" if needed <= room else "float32"
    kv = manifest.kv_cache
    tie = 0.0 if kv is None else tie_of(kv, ran_dtype)
    hidden = any(fact.name == HIDDEN_STATES for fact in manifest.outputs)
    reference = TorchSession(model, manifest.capacity, reference_dtype, spec=manifest.spec, kv=kv, tie=tie,
                             hidden=hidden)
    if reference_dtype == ran_dtype:
        notes.append(f"no room for PyTorch in fp64 ({needed / 1e9:.0f} GB): the reference is fp32, and the "
                     "tolerance is assumed, not measured")
        return reference, None, reference_dtype
    if ran_dtype != "float32":
        model = load_model(checkpoint, ran_dtype)
    return reference, TorchSession(model, manifest.capacity, ran_dtype, spec=manifest.spec, kv=kv,
                                   tie=tie, hidden=hidden), reference_dtype


def tie_of(kv: KvCache, dtype: str) -> float:
    """How far from the middle between two codes, in parts of their distance, a number may be that becomes either: what
    rounding in this format does to the largest code; of fp8, `gqa_export.runtime.quantized_cache.ties` has those of the
    smaller ones."""
    fp8 = kv.codes == "fp8"
    part = (FP8_UNITS if fp8 else limits(kv.bits)[1]) * FLOOR_ULPS[dtype] * EPSILON[dtype]
    return min(MOST_TIE, part if fp8 else max(TIE, part))


def is_large(manifest: Manifest) -> bool:
    """Whether a model's time goes into reading its weights, and not into Python."""
    return weight_bytes(manifest) >= SMALL_BYTES


def weight_bytes(manifest: Manifest) -> int:
    """Bytes of all files of a bundle: its weights, as good as."""
    return sum(fact.size for fact in manifest.files.values())


@contextmanager
def torch_threads(manifest: Manifest) -> Iterator[None]:
    """One PyTorch thread inside, if the model is small."""
    import torch

    before = torch.get_num_threads()
    if not is_large(manifest):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def observed_facts(reference: Any, where: str) -> dict[str, object]:
    """What a checkpoint's model shows of itself in one step; see `gqa_export.bundle.integrity.check_belongs`."""
    from ..trace.states.torch_cache import observed_states

    reference.reset(1)
    logits = reference.step(np.zeros((1, 1), np.int64)).logits
    if not np.isfinite(logits).all():
        raise InvalidCheckpoint("the checkpoint's own logits are NaN or infinite", where,
                                "check its weights; there is nothing to compare with", code="E-CKPT-NAN")
    pairs = reference.cache()
    every = tuple(range(len(pairs)))
    numbers, alike, read = cached_layers(reference.model.config) or (every, frozenset(every), every)
    shown: dict[str, object] = {"model_type": reference.model.config.model_type, "vocabulary": logits.shape[-1],
                                "layers": len(numbers), "layer numbers": numbers, "alike": alike, "caches read": read}
    for number, (key, value) in enumerate(pairs):
        shown[f"key {number}"] = (key.shape[1], key.shape[3])
        shown[f"value {number}"] = (value.shape[1], value.shape[3])
    shown["states"] = tuple((state.layer, state.name, state.shape) for state in observed_states(reference.model.config))
    reference.reset(1)
    return shown


def cached_layers(config: Any) -> tuple[tuple[int, ...], frozenset[int], tuple[int, ...]] | None:
    """The attention layers of a model, those whose keys and values its own cache holds as attention gets them, and of
    each layer the one whose keys and values it reads, its own number mostly.

    Read from the model's code, run once without weights: a manifest's `cached_alike` is a claim of the bundle that is
    under test. None where the model cannot be run so; then all layers are compared.
    """
    import torch

    from ..trace import attention_hook, skeleton
    from ..trace.patches import registry
    from ..trace.probe import rotary
    from ..trace.probe.layer_probe import listen_with_cache, owner_of

    try:
        with registry.applied(config):
            model = skeleton.build(config, torch.float32, device="meta", attention=attention_hook.register())
            rotary.settle(model, 1)
            calls, alike, _ = listen_with_cache(model)
    except GqaExportError:
        return None
    owners = {number: owner_of(call, calls) for number, call in sorted(calls.items())}
    return tuple(owners), frozenset(alike), tuple(
        number if owner is None else owner for number, owner in owners.items())


def choose_bundle_provider(manifest: Manifest, wanted: str, ran_dtype: str) -> str:
    """"cpu" or "cuda" for a wanted "auto", "cpu" or "cuda"; NotCheckedHere where the bundle cannot run on it."""
    from ..runtime.ort.loading import choose_provider
    from ..targets import get_target, on_cpu

    target = get_target(manifest.target)
    if target.engine:
        return choose_provider(wanted, ran_dtype, on_cpu(target).dtypes)
    try:
        return choose_provider(wanted, ran_dtype, target.dtypes)
    except NotCheckedHere as error:
        if ran_dtype in ("float16", "bfloat16"):
            raise NotCheckedHere(error.what, error.where, "export with --dtype fp32, or check the fp32 twin of this "
                                 "graph with `validate --as fp32`", code=error.code) from error
        raise


def load_engine(folder: Path, provider: str, as_dtype: str | None) -> tuple[Session, FillGarbage]:
    """An engine bundle's session, and what fills its unused cache with garbage. Raises as `EngineSession.load`."""
    from ..runtime.open_session import open_engine

    for option, given in (("--as", as_dtype), ("--provider", provider != "auto")):
        if given:
            raise GqaExportError("an engine is compared as it was built, on the GPU", option, f"leave out {option}",
                                 code="E-OPTION-ENGINE")
    session = open_engine(folder)
    return session, session.fill_garbage


def use_adapter(session: Any, manifest: Manifest, against: Any, as_dtype: str | None) -> None:
    """Let a bundle that can switch use the adapter that the checkpoint was opened with. Of another bundle it is merged.

    Raises:
        GqaExportError: the bundle has other adapters only.
        NotCheckedHere: the fp32 twin has none.
    """
    adapter = getattr(against, "adapter", None)
    if adapter is None or not manifest.source.get("adapters"):
        return
    if as_dtype is not None:
        raise NotCheckedHere("the fp32 twin of a bundle has no adapters", "--as, --lora",
                             "export it with --dtype fp32 to compare adapters", code="E-VALIDATE-ADAPTER")
    session.use_adapter(adapter.name)


@contextmanager
def bundle_session(folder: Path, manifest: Manifest, provider: str, notes: list[str], target: Any = None,
                   config: dict[str, str] | None = None,
                   opened: list[Any] | None = None) -> Iterator[tuple[Session, FillGarbage | None]]:
    """The bundle's session, its calls made by Polygraphy's OnnxrtRunner, and what fills its unused cache with
    garbage. target: another row of the table than the manifest's, see `OrtSession.load`. config: session options
    beside the bundle's own. opened: takes the session of ONNX Runtime that the runner calls."""
    from ..runtime.ort.session import OrtSession
    from .session_runner import GarbageTail, onnxrt_infer

    if manifest.dtype == "bfloat16":
        notes.append("numpy does not know bf16: ONNX Runtime was called directly, unused cache was not filled with "
                     "garbage")
        yield OrtSession.load(folder, provider, config=config), None
        return
    threads = 0 if is_large(manifest) else 1
    with onnxrt_infer(folder, manifest, provider, threads, config, opened) as infer:
        tail = GarbageTail(infer, manifest.spec, manifest.window_cache)
        yield OrtSession.load(folder, provider, infer=tail, target=target), tail.fill
