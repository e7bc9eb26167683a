"""Reading the graph of a bundle: the one place where `model.onnx` is parsed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidBundle
from .manifest import MODEL

if TYPE_CHECKING:
    import onnx


def read_graph(place: Path) -> onnx.ModelProto:
    """The ONNX model of a bundle, without the weights that lie beside it.

    Args:
        place: a bundle's folder, or an ONNX file.

    Raises:
        InvalidBundle: the file is missing or is not an ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    path = place / MODEL if place.is_dir() else place
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, OSError, ValueError, RuntimeError) as error:
        raise InvalidBundle(f"{path.name} is not an ONNX model: {error}", str(path),
                            "copy the bundle again, or export it again", code="E-BUNDLE-GRAPH") from error
    return model
