"""What the attention nodes of a graph say of themselves, held against what the manifest says of the layers.

A graph whose attributes contradict its manifest is refused by layer and attribute, before anything runs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GqaExportError
from ..graph_io import present_names
from .manifest import MODEL, Manifest

if TYPE_CHECKING:
    import onnx

SPOKEN = {"scale": "scale", "softcap": "softcap", "window": "window", "local_window_size": "window",
          "num_heads": "num_heads", "kv_num_heads": "kv_num_heads", "q_num_heads": "num_heads"}
"""attribute of an attention node -> field of `AttentionSpec`"""
LAYERS = 4096


def attention_facts(model: onnx.ModelProto) -> dict[int, dict[str, Any]]:
    """Per layer whose attention node writes its present key itself: what that node's attributes say, by the field of
    `AttentionSpec`."""
    owners = {present_names(layer)[0]: layer for layer in range(LAYERS)}
    found: dict[int, dict[str, Any]] = {}
    for node in model.graph.node:
        layer = next((owners[name] for name in node.output if name in owners), None)
        if layer is None or "Attention" not in node.op_type:
            continue
        said = {SPOKEN[a.name]: a.f if a.type == 1 else a.i for a in node.attribute if a.name in SPOKEN}
        if said.get("window", 0) < 0:
            said["window"] = 0  # com.microsoft's word for none
        found[layer] = said
    return found


def check_claims(folder: Path, manifest: Manifest) -> None:
    """Refuse a graph whose attention contradicts the manifest, naming layer and attribute (GqaExportError)."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(folder / MODEL), load_external_data=False)
    except DecodeError as error:
        raise GqaExportError(f"{MODEL} is not an ONNX file: {error}", str(folder / MODEL),
                             "copy the bundle again, or export it again") from error
    facts = attention_facts(model)
    for layer in manifest.spec.layers:
        for name, value in facts.get(layer.layer, {}).items():
            stated = getattr(layer, name)
            if not math.isclose(value, stated, rel_tol=1e-6, abs_tol=1e-9):
                raise GqaExportError(f"layer {layer.layer}: the graph's {name} is {value:g}, the manifest says "
                                     f"{stated:g}", str(folder / MODEL),
                                     "model.onnx and gqa_export.json belong to different exports: export again")
