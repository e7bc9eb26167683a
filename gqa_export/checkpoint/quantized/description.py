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
        """The first of these fields that is there as a whole number."""
        for name in names:
            value = self.fields.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return default

    def text(self, *names: str) -> str:
        """The first of these fields that is there, as a text in lower case; "" if none is."""
        return next((str(self.fields[name]).lower() for name in names if self.fields.get(name) is not None), "")


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
