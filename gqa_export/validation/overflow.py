"""Why outputs are not finite: PyTorch's own model, run in the bundle's number format, may overflow there as well."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..checkpoint.decoder_layers import layer_lists
from ..compare.case_driver import CaseLog
from .sessions import Sessions

WIDER = {"float16": "--dtype bf16 or fp32", "bfloat16": "--dtype fp32", "float32": ""}
"""formats with larger numbers, as an option of `gqa-export onnx`"""


def overflow_words(sessions: Sessions, logs: Iterable[CaseLog], dtype: str) -> str:
    """Which part of the model overflows the number format `dtype`, in the bundle and in PyTorch alike; "" if a bundle's
    outputs are finite, or PyTorch's are."""
    if sessions.eager is None or not WIDER[dtype]:
        return ""
    for log in logs:
        bundle = any(one.difference.nonfinite for one in log.bundle)
        if bundle and not all(np.isfinite(error) for error in (log.baseline or {}).values()):
            return f"{_place(sessions.eager, log.case.prompts)} overflows {dtype}, in PyTorch too: {WIDER[dtype]}"
    return ""


def _place(eager: Any, prompts: Iterable[np.ndarray]) -> str:
    """The first layer of a PyTorch session whose output is not finite for one of these prompts."""
    import torch

    model, found = eager.model, list[str]()
    count = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0) or 0)
    layers: Any = next((layers for _, layers in layer_lists(model, count)), ())

    def look(number: int) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not found and not bool(torch.isfinite(hidden).all()):
                found.append(f"layer {number}")
        return hook

    handles = [layer.register_forward_hook(look(number)) for number, layer in enumerate(layers)]
    try:
        for prompt in prompts:
            if not found and len(prompt):
                eager.reset(1)
                finite = np.isfinite(eager.step(prompt[None, : eager.capacity]).logits).all()
                if not finite and not found:
                    found.append("what follows the last layer")
    finally:
        for handle in handles:
            handle.remove()
        eager.reset(1)
    return found[0] if found else "the model"
