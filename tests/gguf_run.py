"""A checkpoint exported and run in ONNX Runtime itself, token after token."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def exported_logits(checkpoint: Path, folder: Path, ids: list[int], first: int,
                    capacity: int | None = None) -> np.ndarray:
    """Logits after each of the ids, [length, vocabulary], of the `ort` target in fp32 with a growing cache: a prefill
    of `first` tokens, then a step for each of the others."""
    import onnxruntime

    import gqa_export

    gqa_export.export(checkpoint, folder, target="ort", dtype="fp32", cache="growing", capacity=capacity)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    ports = session.get_inputs()
    cache = {port.name: np.zeros((1, port.shape[1], 0, port.shape[3]), np.float32)
             for port in ports if port.name.startswith("past_key_values.")}
    found, length = [], 0
    for part in [ids[:first], *([one] for one in ids[first:])]:
        length += len(part)
        feed = {"input_ids": np.array([part]), "attention_mask": np.ones((1, length), np.int64), **cache}
        logits, *present = session.run(None, {port.name: feed[port.name] for port in ports})
        cache = dict(zip(cache, present, strict=True))
        found.append(logits[0])
    return np.concatenate(found)
