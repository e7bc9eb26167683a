"""Number formats of weights, and converting from one to another: a value that would become infinite is an error."""

from __future__ import annotations

from typing import Any

from ..errors import GqaExportError
from ..spec import FLOATS

LIMITS = {"float16": 65504.0, "bfloat16": 3.38e38, "float32": 3.4e38}
"""up to here no finite value rounds to infinity; beyond, and for a NaN, every element is looked at"""


def numpy_dtype(name: str) -> Any:
    """The numpy dtype of a name, those of ml_dtypes (bfloat16, float8_...) included."""
    import ml_dtypes
    import numpy as np

    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


def itemsize(name: str) -> int:
    """Bytes of one element of a type, by its numpy (ml_dtypes) name."""
    return int(numpy_dtype(name).itemsize)


def cast(data: memoryview, source: str, target: str, name: str) -> memoryview:
    """Convert elements of one float type to another, rounded to nearest even.

    Args:
        data: little-endian elements of type `source`.
        source: numpy (ml_dtypes) name of their type.
        target: numpy (ml_dtypes) name of the type to convert to.
        name: of the tensor, for the message.

    Returns:
        The bytes of the converted elements; `data` itself if the types are equal.

    Raises:
        GqaExportError: a finite value does not fit the new type, or a type is not a float type.
    """
    if source == target:
        return data
    import numpy as np

    if not {source, target} <= set(FLOATS.values()):
        raise GqaExportError(f"cannot convert {name} from {source} to {target}", name,
                             "export with --dtype auto, which keeps the stored types", code="E-WEIGHTS-CONVERT")
    values = np.frombuffer(data, numpy_dtype(source))
    if source == "bfloat16":  # its bits are the upper half of a float32's
        values = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        result: Any = values.astype(numpy_dtype(target))
        wider = source != "float16" and (source, target) != ("bfloat16", "float32")
        if wider and target in LIMITS and not max(values.max(initial=0), -values.min(initial=0)) < LIMITS[target]:
            overflow = np.isfinite(values) & ~np.isfinite(result)
            if overflow.any():
                worst = float(np.abs(values[overflow]).max())
                raise GqaExportError(f"{name} has a value of {worst:.6g}, which {target} cannot hold", name,
                                     "export with --dtype fp32 or --dtype bf16", code="E-WEIGHTS-OVERFLOW")
    return memoryview(result.view(np.uint8))
