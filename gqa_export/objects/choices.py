"""The closed sets that options of the public API come from, and the check that a value is one of them: types are not
checked when a program runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import GqaExportError

Target = Literal["ort", "onnx", "portable", "trt-plugin", "trt-native"]
Dtype = Literal["auto", "fp32", "fp16", "bf16"]
Cache = Literal["growing", "static"]
Weights = Literal["copy", "link", "inplace"]
Logits = Literal["all", "last"]
Provider = Literal["auto", "cpu", "cuda"]
Level = Literal["quick", "full"]
Flavor = Literal["auto", "tensorrt", "rtx"]
Attention = Literal["plugin", "native"]
Method = Literal["mean", "first", "random", "svd", "calibrated"]
Grouping = Literal["contiguous", "similarity"]
Activations = Literal["int8", "exact", "same"]
KvCodes = Literal["int8", "int4", "fp8"]
WindowCaches = Literal["full", "small"]
Head = Literal["int8", "same", "none"]
Speculate = Literal["ngram"]
Place = str | Path
"""a file or folder"""

SETS: dict[str, Any] = {
    "target": Target, "dtype": Dtype, "cache": Cache, "weights": Weights, "logits": Logits, "provider": Provider,
    "level": Level, "flavor": Flavor, "attention": Attention, "method": Method, "grouping": Grouping,
    "as_dtype": Literal["fp32"], "activations": Activations, "head": Head,
    "kv_cache": KvCodes, "block": Literal[16, 32, 64, 128, 256], "speculate": Speculate,
    "window_cache": WindowCaches}
"""the closed set of each option that has one"""


def check_choices(**given: object) -> None:
    """Refuse a value that is not in the closed set of its option; None is "not given".

    Raises:
        GqaExportError: names the option and the set.
    """
    for option, value in given.items():
        allowed = get_args(SETS[option])
        if value is not None and value not in allowed:
            names = ", ".join(map(str, allowed))
            raise GqaExportError(f"{option} is {value!r}, expected one of {names}", option, f"pass one of {names}",
                                 code="E-OPTION-CHOICE")


def check_counts(**given: int | None) -> None:
    """Refuse a number below 1 where a count is expected; None is "not given".

    Raises:
        GqaExportError: names the option.
    """
    for option, value in given.items():
        if value is not None and value < 1:
            raise GqaExportError(f"{option} is {value}, expected at least 1", option, "pass 1 or more, or None",
                                 code="E-OPTION-COUNT")


def refuse_revision(revision: str | None, source: object, found: str) -> None:
    """Refuse a revision of something that is not a hub id.

    Raises:
        GqaExportError: says what the source is instead.
    """
    if revision is not None:
        raise GqaExportError(f"a revision is a branch, tag or commit of the hub, and this is {found}", str(source),
                             "leave out revision, or give a hub id", code="E-OPTION-REVISION")
