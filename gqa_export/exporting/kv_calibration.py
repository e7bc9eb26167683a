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
from ..errors import GqaExportError, InvalidCheckpoint, UnsupportedModel
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
        InvalidCheckpoint: keys or values are NaN or infinite.
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
    ids = tokens_of(checkpoint, text)
    if len(ids) < LEAST_TOKENS:
        raise GqaExportError(f"the text has {len(ids)} tokens, scales of a cache need at least {LEAST_TOKENS}",
                             str(text), "give a longer text", code="E-FILE-TEXT-SHORT")
    found = keys_and_values(checkpoint, ids, capacity, say)
    chosen = [[choose_scale(numbers, bits, fp8) for numbers in kept] for kept in found]
    scales = tuple(KvScales(layer.layer, key, value, key_clip, value_clip)
                   for layer, ((key, key_clip), (value, value_clip)) in zip(spec.layers, chosen, strict=True))
    return KvCache(bits, scales, digest_of(ids), len(ids), "fp8" if fp8 else "int")


def tokens_of(checkpoint: Checkpoint, text: Path) -> np.ndarray:
    """int64 `[T]`: the tokens of a text that are read. Raises as `read_beginning`."""
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.gguf_file)
    return tokenize(tokenizer, read_beginning(text).text, MOST_TOKENS).astype(np.int64)


def digest_of(ids: np.ndarray) -> str:
    """`KvCache.calibration` of tokens."""
    return hashlib.sha256(ids.tobytes()).hexdigest()


def keys_and_values(checkpoint: Checkpoint, ids: np.ndarray, capacity: int,
                    say: Progress) -> list[tuple[np.ndarray, np.ndarray]]:
    """All keys, flat, and all values of each layer, while the model reads tokens in rows of 512.

    Raises:
        InvalidCheckpoint: some are NaN or infinite.
    """
    from ..runtime.torch_session import TorchSession

    say("loading the model to choose the cache's scales", None, None)
    length = min(LENGTH, capacity)
    session = TorchSession(load_model(checkpoint, "float32"), capacity, "float32")
    rows: list[list[tuple[np.ndarray, np.ndarray]]] = []
    for start in range(0, len(ids), length):
        session.reset(1)
        session.step(ids[None, start: start + length])
        rows.append([(key.reshape(-1), value.reshape(-1)) for key, value in session.cache()])
        say("choosing the cache's scales", min(start + length, len(ids)), len(ids))
    numbers = [(np.concatenate([key for key, _ in layer]), np.concatenate([value for _, value in layer]))
               for layer in zip(*rows, strict=True)]
    for number, pair in enumerate(numbers):
        for kind, each in zip(("keys", "values"), pair):
            if not np.isfinite(each).all():
                raise InvalidCheckpoint(f"the {kind} of layer {number} are NaN or infinite for the calibration text: "
                                        "no scale fits them", checkpoint.source, "check the checkpoint's weights",
                                        code="E-CKPT-NAN")
    return numbers
