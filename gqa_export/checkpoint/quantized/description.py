"""How a folder describes its weights as quantized: in config.json, or in a file of its own beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...files.read_json import read_json
from ..refusals import QUANTIZATION, quantization_method

METHODS = ("auto-round", "awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "hqq", "modelopt",
           "mxfp4", "olive", "torchao")
"""methods that are read; their readers are in `read`"""
BESIDE = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
"""files that older releases of ModelOpt, GPTQ's and AWQ's packages wrote beside a config.json that does not know"""


@dataclass(frozen=True)
class Description:
    """A quantization as it is described.

    Attributes:
        method: "gptq", "compressed-tensors", ...; "" if nothing is described.
        fields: the entry.
        file: that it is in.
    """

    method: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    file: str = "config.json"

    def number(self, *names: str, default: int | None = None) -> int | None:
        """The first of these fields that is there.

        Raises:
            ValueError: it is not a whole number.
        """
        found = (whole_number(name, self.fields.get(name)) for name in names)
        return next((value for value in found if value is not None), default)

    def text(self, *names: str) -> str:
        """The first of these fields that is there, as a text in lower case; "" if none is."""
        return next((str(self.fields[name]).lower() for name in names if self.fields.get(name) is not None), "")


def whole_number(name: str, value: object) -> int | None:
    """A field's value, which some packages write as a text ("4") or a float (32.0); None if there is none.

    Raises:
        ValueError: it is not a whole number.
    """
    if value is None:
        return None
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = 0.5
        if number.is_integer():
            return int(number)
    raise ValueError(f"{name} is {value!r}, expected a whole number")


def described(folder: Path, config: dict[str, Any]) -> Description:
    """The quantization that a folder describes; config: its config.json."""
    if method := quantization_method(config):
        entry: dict[str, Any] = next((config[key] for key in QUANTIZATION if isinstance(config.get(key), dict)), {})
        return Description(method.lower(), entry)
    for name, method in BESIDE.items():
        if (folder / name).is_file():
            fields = read_json(folder / name)
            inner = fields.get("quantization")
            return Description(method, inner if isinstance(inner, dict) else fields, name)
    return Description()
