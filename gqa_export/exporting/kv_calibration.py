"""Chooses the scales of a quantized cache: PyTorch reads a text, and each layer's keys and values are measured."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.load_model import load_model
from ..checkpoint.tokenized_text import load_tokenizer, read_beginning, tokenize
from ..errors import GqaExportError, UnsupportedModel
from ..lowering.kv_codes import CODES_IN_BODY
from ..progress import Progress
from ..quantized.kv_codes import choose_scale
from ..spec import AttentionSpec, KvCache, KvScales, ModelSpec
from ..targets import TARGETS, Target, layers_label, reasons_against
from .options import ExportOptions

if TYPE_CHECKING:
    from ..trace.traced import Traced

LENGTH = 512
"""tokens that are read with one cache"""
MOST_TOKENS = 2048
"""tokens of the text that are read: a scale is one number, and more of them move it little"""
LEAST_TOKENS = 32


def cache_of(checkpoint: Checkpoint, traced: Traced, options: ExportOptions, target: Target,
             say: Progress) -> KvCache | None:
    """How an export's cache is quantized; None where it holds numbers. Raises as `refuse_kv` and `calibrate_cache`."""
    if not options.kv_cache:
        return None
    fp8 = options.kv_cache == "fp8"
    bits = 8 if fp8 else int(options.kv_cache.removeprefix("int"))
    refuse_kv(target, bits, traced.spec.layers, fp8)
    return calibrate_cache(checkpoint, traced.spec, bits, options.calibrate, traced.capacity, say, fp8)


def refuse_kv(target: Target, bits: int, layers: Iterable[AttentionSpec], fp8: bool = False) -> None:
    """Refuse a quantized cache that a target does not have, or that a layer of the model cannot use.

    Args:
        target: the row. bits: of a code. layers: of the model. fp8: codes are 8-bit floats.

    Raises:
        UnsupportedModel: the target's reason, or the layer.
    """
    if fp8 and not target.kv_fp8:
        others = [row.name for row in TARGETS.values() if row.kv_fp8]
        raise UnsupportedModel(f"target {target.name} does not hold a cache of fp8 codes: {target.kv_missing}",
                               "--kv-cache fp8", f"leave out --kv-cache, or use --target {' or '.join(others)}"
                               + (" or --kv-cache int8" if 8 in target.kv_bits else ""), code="E-TARGET-KV")
    others = [row.name for row in TARGETS.values() if bits in row.kv_bits]
    if bits not in target.kv_bits:
        raise UnsupportedModel(f"target {target.name} does not hold a cache of {bits}-bit codes: {target.kv_missing}",
                               f"--kv-cache int{bits}", "leave out --kv-cache, or use "
                               + " or ".join([f"--target {' or '.join(others)}", *(
                                   ["--kv-cache int8"] if 8 in target.kv_bits else [])]), code="E-TARGET-KV")
    layers = list(layers)
    reasons = reasons_against(layers, target)
    wide = [layer.layer for layer in layers if target.cannot_hold(layer)]
    if reasons and bits not in CODES_IN_BODY:
        raise UnsupportedModel(f"only {target.attention} holds a cache of {bits}-bit codes, and it cannot hold these "
                               f"layers: {'; '.join(reasons)}", layers_label(wide),
                               "leave out --kv-cache, or use --kv-cache int8", code="E-TARGET-KV")


def calibrate_cache(checkpoint: Checkpoint, spec: ModelSpec, bits: int, text: Path | None, capacity: int,
                    say: Progress, fp8: bool = False) -> KvCache:
    """The scales of every layer, one for its keys and one for its values.

    Args:
        checkpoint: whose model reads the text. spec: of it. bits: of a code, 8 or 4.
        text: a UTF-8 file; None is refused, because scales without a text would be a guess.
        capacity: of the bundle, in tokens.
        say: called with what is done.
        fp8: codes are 8-bit floats.

    Raises:
        GqaExportError: there is no text, or it is too short.
        UnsupportedModel: PyTorch's own cache does not hold what a layer's attention gets, or a state beside it.
    """
    if text is None:
        raise GqaExportError("the scales of a quantized cache are chosen from a text",
                             f"--kv-cache {'fp8' if fp8 else f'int{bits}'}",
                             "give a UTF-8 file of text like the one that will be processed: --calibrate FILE",
                             code="E-OPTION-CALIBRATE")
    apart = [layer.layer for layer in spec.layers if not layer.cached_alike]
    if apart or spec.states or not spec.layers or [layer.layer for layer in spec.layers] != list(range(spec.depth)):
        raise UnsupportedModel("a quantized cache needs a model whose every layer caches its own keys and values, as "
                               "attention gets them", f"layers {apart}" if apart else checkpoint.source,
                               "leave out --kv-cache", code="E-MODEL-KV")
    from ..runtime.torch_session import TorchSession

    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.gguf_file)
    ids = tokenize(tokenizer, read_beginning(text).text, MOST_TOKENS).astype(np.int64)
    if len(ids) < LEAST_TOKENS:
        raise GqaExportError(f"the text has {len(ids)} tokens, scales of a cache need at least {LEAST_TOKENS}",
                             str(text), "give a longer text", code="E-FILE-TEXT-SHORT")
    say("loading the model to choose the cache's scales", None, None)
    length = min(LENGTH, capacity)
    session = TorchSession(load_model(checkpoint, "float32"), capacity, "float32")
    found: list[tuple[list[np.ndarray], list[np.ndarray]]] = [([], []) for _ in spec.layers]
    for start in range(0, len(ids), length):
        session.reset(1)
        session.step(ids[None, start: start + length])
        for kept, pair in zip(found, session.cache(), strict=True):
            for list_, array in zip(kept, pair, strict=True):
                list_.append(array.reshape(-1))
        say("choosing the cache's scales", min(start + length, len(ids)), len(ids))
    chosen = [[choose_scale(np.concatenate(arrays), bits, fp8) for arrays in kept] for kept in found]
    scales = tuple(KvScales(layer.layer, key, value, key_clip, value_clip)
                   for layer, ((key, key_clip), (value, value_clip)) in zip(spec.layers, chosen, strict=True))
    return KvCache(bits, scales, hashlib.sha256(ids.tobytes()).hexdigest(), len(ids), "fp8" if fp8 else "int")
