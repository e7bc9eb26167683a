"""What becomes of each weight of an export that quantizes, or keeps what is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..quantized.facts import MatrixFacts
from ..quantized.matrix import QuantizedMatrix
from ..quantizing.matrices import Weight

if TYPE_CHECKING:
    from ..bundle.quantization import BitsSearch
    from ..quantized.input_codes import InputCodes
    from ..quantizing.errors_of_bits import Measured


@dataclass(frozen=True)
class Plan:
    """What is quantized, and what stays as it is.

    Attributes:
        method: as the manifest names it.
        exact: products do not round their inputs.
        matrices: name of a weight -> what is packed.
        facts: of those.
        stored: name of a weight -> what the checkpoint holds, for people. codes: those that it holds as codes; None: of
            which the values alone are known.
        plain: name of a weight -> why it stays floating-point numbers.
        weights: of the model, in the order of the graph.
        open: name of a weight whose bits are to be chosen -> what each number of bits would lose; `matrices` has it
            with the lowest. apart: int64 `[rows, length]`, tokens to measure on; None without a limit that needs them.
        errors: name -> bits -> error, where bits are chosen. search: how the bits were chosen.
        calibration: sha256 of the text that weighed errors. tokens: of it that were used. importance: name of a weight
            -> how much errors of its columns count. largest: -> the largest absolute value of its input.
        same: products round their inputs to the type of their weight. inputs: name of a weight -> how. exact_inputs:
            -> why they do not.
        kept: names of weights whose codes are the checkpoint's own, beside others that are rounded.
        notes: what a user must know of them.
    """

    method: str
    exact: bool
    matrices: Mapping[str, QuantizedMatrix] = field(default_factory=dict)
    facts: Mapping[str, MatrixFacts] = field(default_factory=dict)
    stored: Mapping[str, str] = field(default_factory=dict)
    codes: Mapping[str, QuantizedMatrix | None] = field(default_factory=dict)
    plain: Mapping[str, str] = field(default_factory=dict)
    weights: tuple[Weight, ...] = ()
    open: Mapping[str, Measured] = field(default_factory=dict)
    apart: Any = None
    errors: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    search: BitsSearch | None = None
    calibration: str = ""
    tokens: int = 0
    importance: Mapping[str, Any] = field(default_factory=dict)
    largest: Mapping[str, float] = field(default_factory=dict)
    same: bool = False
    inputs: Mapping[str, InputCodes] = field(default_factory=dict)
    exact_inputs: Mapping[str, str] = field(default_factory=dict)
    kept: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
