"""Whether a graph has the values of a checkpoint's weight to the rounding of fp32, or rounds them to fp16 or bf16.

This is told by types alone, and no value is read: where types do not tell, the answer is no. A product of a code and a
scale has as many binary digits as both together, one of a power of two no more than the code.
"""

from __future__ import annotations

from .facts import E4M3, Form
from .matrix import QuantizedMatrix

DIGITS = {"float16": 11, "bfloat16": 8}
"""number format -> its binary digits"""
CODE_DIGITS = {"e4m3": 4, "e2m1": 2}
"""kind -> digits of its numbers. Those of nf4 and fp4 have all of float32's"""
FLOAT32_DIGITS = 24
INSIDE = {"float32": ("float32", "float16", "bfloat16", E4M3, "float8_e5m2"),
          "float16": ("float16", E4M3, "float8_e5m2"), "bfloat16": ("bfloat16", E4M3, "float8_e5m2")}
"""number format -> the types all of whose numbers it has"""
INSIDE_AN_OPERATOR = ("MatMulNBits", "MatMulBnb4")
"""operators that read codes and scales, and write no value of the weight as a number of the graph's format"""


def holds_type(dtype: str, stored: str) -> bool:
    """Whether a number format has every number of a stored type."""
    return stored in INSIDE.get(dtype, ())


def holds_values(matrix: QuantizedMatrix, dtype: str) -> bool:
    """Whether a number format has every value that a matrix's codes stand for."""
    if dtype == "float32":
        return True
    if matrix.offset != "none" or matrix.column_scale is not None:
        return False  # zero points may lie far from the codes
    if dtype == "float16" and (matrix.kind == "e4m3" or _scales(matrix) != E4M3):
        return False  # values may be beyond 65504, or below the smallest number
    # integers around zero have a digit less than bits: the one that would need all of them is a power of two
    code = matrix.bits - 1 if matrix.kind == "int" else CODE_DIGITS.get(matrix.kind, FLOAT32_DIGITS)
    return code + _scale_digits(matrix) <= DIGITS.get(dtype, 0)


def holds(matrix: QuantizedMatrix, form: Form, dtype: str) -> bool:
    """Whether a graph of a number format has the values of a matrix that an operator holds in a form."""
    if dtype == "float32":
        return True
    if form.shift or matrix.column_scale is not None:
        return False  # what a block adds, and the factor of an input, are numbers of the graph's format
    if form.operator not in INSIDE_AN_OPERATOR:
        return holds_values(matrix, dtype)
    return form.half if dtype == "float16" else _scale_digits(matrix) <= DIGITS.get(dtype, 0)


def _scales(matrix: QuantizedMatrix) -> str:
    """The type of the scales, a second one of the whole matrix included."""
    return matrix.scale_dtype if matrix.global_scale == 1.0 else "float32"


def _scale_digits(matrix: QuantizedMatrix) -> int:
    if matrix.powers and matrix.global_scale == 1.0:
        return 0
    return {E4M3: CODE_DIGITS["e4m3"], **DIGITS}.get(_scales(matrix), FLOAT32_DIGITS)
