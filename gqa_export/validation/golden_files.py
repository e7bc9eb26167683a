"""PyTorch's answers as files that Polygraphy reads: `inputs.json` and `outputs.json` for
`polygraphy run model.onnx --onnxrt --load-inputs inputs.json --load-outputs outputs.json`.

Every iteration is one call of the graph with its whole cache: a prompt, the steps after it, a piece of several tokens
on a filled cache, and two rows of the same length. All of every output is compared there, so nothing in them may be
unspecified: no padding, and a static cache whose tail is zero. Dimensions as in `gqa_export.attention_op`.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.manifest import Manifest
from ..errors import GqaExportError
from ..graph_io import HIDDEN_STATES, LOGITS, past_names, past_state, present_names, present_state
from ..runtime.feeds import step_feed
from ..runtime.ort.backend import numpy_dtype
from ..runtime.session import Session
from ..targets import Target

INPUTS, OUTPUTS = "inputs.json", "outputs.json"
RUNNER = "gqa-export PyTorch"
PLANS = (("batch 1", 1, (7, 1, 1, 1, 3)), ("batch 2", 2, (5, 1)))
"""name, rows, new tokens of each step"""
STATIC_TOKENS = 16
"""size of the buffer of a static cache: longer than any of these sequences"""


def check_target(manifest: Manifest, target: Target) -> None:
    """Refuse a bundle whose graph Polygraphy cannot run this way."""
    if target.engine or manifest.dtype == "bfloat16":
        why = "numpy does not know bf16" if not target.engine else f"{target.name} updates its cache in place"
        raise GqaExportError(f"files for Polygraphy cannot be written for this bundle: {why}", "--polygraphy",
                             "export with --target ort, onnx or portable and --dtype fp32 for it",
                             code="E-OPTION-POLYGRAPHY")
    if manifest.kv_cache is not None:
        raise GqaExportError("files for Polygraphy cannot be written for this bundle: its cache holds codes, where "
                             "either of two may be right", "--polygraphy", "export without --kv-cache for it",
                             code="E-OPTION-POLYGRAPHY")
    if manifest.window_cache is not None:
        raise GqaExportError("files for Polygraphy cannot be written for this bundle: its windowed layers keep rings",
                             "--polygraphy", "export with --window-cache full for it", code="E-OPTION-POLYGRAPHY")


def write_files(folder: Path, reference: Session, manifest: Manifest, seed: int = 11) -> float:
    """Write both files.

    Args:
        folder: made if needed.
        reference: PyTorch's session of the checkpoint.
        manifest: of the bundle that Polygraphy will run.
        seed: of the random token ids.

    Returns:
        The largest number in the files, which a tolerance is made of.
    """
    from polygraphy.comparator import RunResults
    from polygraphy.comparator.struct import IterationResult
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    random, dtype = np.random.default_rng(seed), numpy_dtype(manifest.dtype)
    feeds: list[OrderedDict[str, Any]] = []
    golden: list[Any] = []
    for _, rows, counts in PLANS:
        reference.reset(rows)
        for count in counts:
            ids = random.integers(0, manifest.spec.vocabulary, (rows, count))
            feed, lengths = _feed(reference, manifest, ids, dtype), reference.lengths + count
            step = reference.step(ids)
            logits = step.logits
            outputs = OrderedDict({LOGITS: (logits[:, -1:] if manifest.logits == "last" else logits).astype(dtype)})
            if step.hidden is not None:
                outputs[HIDDEN_STATES] = step.hidden.astype(dtype)
            for layer, pair in zip(manifest.spec.owners, reference.cache(), strict=True):
                for name, array in zip(present_names(layer.layer), pair):
                    outputs[name] = _cache(array, int(lengths[0]), manifest, dtype)
            for state, array in zip(manifest.spec.states, reference.states(), strict=True):
                outputs[present_state(state)] = array.astype(state.dtype)
            feeds.append(feed)
            golden.append(IterationResult(outputs, runner_name=RUNNER))
    folder.mkdir(parents=True, exist_ok=True)
    results = RunResults()
    results.append((RUNNER, golden))
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        save_json(feeds, str(folder / INPUTS))
        save_json(results, str(folder / OUTPUTS))
    return max(float(np.abs(array.astype(np.float64)).max(initial=0)) for one in golden for array in one.values())


def _feed(reference: Session, manifest: Manifest, ids: np.ndarray, dtype: np.dtype) -> OrderedDict[str, Any]:
    """What the graph takes for this step: token ids, the mask, the cache as the reference has it."""
    lengths, past = reference.lengths, int(reference.lengths[0])
    feed = OrderedDict(step_feed("mask", ids, lengths, np.full(len(ids), ids.shape[1]), past))
    pairs = reference.cache() if past else [None] * len(manifest.spec.owners)
    for layer, pair in zip(manifest.spec.owners, pairs, strict=True):
        sizes = (layer.head_size, layer.value_head_size)
        arrays = pair or [np.zeros((len(ids), layer.kv_num_heads, 0, size)) for size in sizes]
        for name, array in zip(past_names(layer.layer), arrays):
            feed[name] = _cache(array, past, manifest, dtype)
    for state, array in zip(manifest.spec.states, reference.states(), strict=True):
        feed[past_state(state)] = array.astype(state.dtype)
    return feed


def _cache(array: np.ndarray, length: int, manifest: Manifest, dtype: np.dtype) -> np.ndarray:
    """The first `length` tokens; of a static cache in a zeroed buffer."""
    content = np.ascontiguousarray(array[:, :, :length], dtype)
    if manifest.cache == "growing":
        return content
    room = min(manifest.capacity, STATIC_TOKENS)
    buffer = np.zeros((*content.shape[:2], room, content.shape[3]), dtype)
    buffer[:, :, :length] = content
    return buffer
