"""What decides how hard a bundle is tested, read from its graph: a manifest comes from outside, and no field of it may
make a check weaker."""

from __future__ import annotations

from pathlib import Path

from ..bundle.graph_file import read_graph
from ..bundle.manifest import MANIFEST, Manifest
from ..errors import InvalidBundle
from ..graph_io import LOGITS


def logits_of_last_token(manifest: Manifest, where: str) -> bool:
    """Whether a bundle gives the logits of each row's last token only, as its outputs show, which are held against the
    graph when it is opened.

    Raises:
        InvalidBundle: the manifest's field `logits` is not that of its outputs. It would hide all other rows.
    """
    shape = next((fact.shape for fact in manifest.outputs if fact.name == LOGITS), ())
    last = len(shape) == 3 and shape[1] == 1
    if shape and last != (manifest.logits == "last"):
        raise InvalidBundle(f"the manifest's logits are {manifest.logits!r}, and its output has the shape "
                            f"{list(shape)}", f"{where}/{MANIFEST}",
                            "export the bundle again with this version of gqa-export", code="E-BUNDLE-LOGITS")
    return last


def takes_whole_row_masks(folder: Path) -> bool:
    """Whether a bundle's graph must take masks that have all ones of a row first: what has GroupQueryAttention, which
    counts them, is an `ort` graph, whatever target the manifest names."""
    return any(node.op_type == "GroupQueryAttention" and node.domain == "com.microsoft"
               for node in read_graph(folder).graph.node)


def nan_tail_safe(folder: Path) -> bool:
    """Whether a bundle's graph must ignore NaN beyond the valid tokens: all but ONNX's own Attention, which adds its
    mask to scores. What target the manifest names does not matter."""
    return not any(node.op_type == "Attention" and node.domain in ("", "ai.onnx")
                   for node in read_graph(folder).graph.node)
