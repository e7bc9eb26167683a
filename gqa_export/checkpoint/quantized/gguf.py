"""The quantized matrices of a GGUF file under transformers' names, as they are stored: no value is rounded.

They come to the order of rows and the joined matrices that transformers has by being read in that order.
"""

from __future__ import annotations

import numpy as np

from ...quantized.combine import joinable, joined, reordered, some_rows
from ...quantized.matrix import QuantizedMatrix
from ..gguf_facts import GgufFacts
from ..gguf_families import GLOBAL, QKV
from ..gguf_names import JOINED, place_of
from .gguf_tensor import stored_matrix

Matrices = dict[str, QuantizedMatrix]
FLOATS = ("F32", "F16", "BF16", "F64")
"""types that are plain numbers"""


def gguf_matrices(facts: GgufFacts) -> Matrices:
    """Every quantized matrix of the file by transformers' name of the parameter.

    What is not here is plain, of a type that is not kept, or joined of matrices of different types: its values alone
    are read.

    Raises:
        InvalidCheckpoint: rows of a matrix do not consist of whole blocks.
    """
    found: Matrices = {}
    for name, (_, shape) in facts.header.tensors.items():
        place = place_of(facts, name)
        matrix = stored_matrix(facts.header, name) if place is not None and len(shape) > 1 else None
        if matrix is None or place is None:
            continue
        if place.layer is None:
            found[f"{GLOBAL[place.stem]}.{place.suffix}"] = matrix
            continue
        parts = {place.stem: matrix}
        if place.stem == JOINED:
            ends = np.cumsum([0, *facts.split_rows]).tolist()
            parts = {stem: some_rows(matrix, start, stop) for stem, start, stop in zip(QKV, ends, ends[1:])
                     if matrix.rows == ends[-1]}
        for stem, part in parts.items():
            found[_place(facts, place.layer, stem)] = _ordered(facts, stem, part)
    return _joined(facts, found)


def gguf_values_alone(facts: GgufFacts, found: Matrices) -> dict[str, str]:
    """Parameters that the file stores as codes and `found` does not have: transformers' name -> the types, in words."""
    from gguf.constants import GGMLQuantizationType

    labels: dict[str, list[str]] = {}
    for name, (kind, shape) in facts.header.tensors.items():
        place, label = place_of(facts, name), GGMLQuantizationType(kind).name
        if place is None or len(shape) < 2 or label in FLOATS:
            continue
        for stem in QKV if place.stem == JOINED else (place.stem,):
            whole = f"{GLOBAL[place.stem]}.{place.suffix}" if place.layer is None else \
                _place(facts, place.layer, stem).partition(":")[0]
            if facts.family.joined and stem in QKV:
                whole = f"model.layers.{place.layer}.self_attn.qkv_proj.weight"
            labels.setdefault(whole, []).append(label)
    return {name: f"GGUF {' and '.join(dict.fromkeys(kinds))}" for name, kinds in labels.items() if name not in found}


def _place(facts: GgufFacts, layer: int, stem: str) -> str:
    """The name of a layer's parameter; parts of joined experts keep llama.cpp's after a colon."""
    name = f"model.layers.{layer}.{facts.family.layer.get(stem, stem)}"
    if stem in ("ffn_gate_exps", "ffn_up_exps"):
        return f"{name}:{stem}"
    return name if stem == "ffn_down_exps" else f"{name}.weight"


def _ordered(facts: GgufFacts, stem: str, matrix: QuantizedMatrix) -> QuantizedMatrix:
    """Rows of a head from the order of rotated neighbours to that of rotated halves."""
    heads = facts.heads if stem == "attn_q" else facts.kv_heads
    if not facts.family.paired or stem not in ("attn_q", "attn_k") or matrix.rows % (2 * heads):
        return matrix
    order = np.arange(matrix.rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return reordered(matrix, order)


def _joined(facts: GgufFacts, found: Matrices) -> Matrices:
    """Matrices that transformers has as one. Where some parts are missing or of other types, the whole is left out."""
    for layer in range(facts.layers):
        stem = f"model.layers.{layer}"
        if facts.family.joined:
            parts = [found.pop(f"{stem}.self_attn.{part}_proj.weight", None) for part in "qkv"]
            there = [part for part in parts if part is not None]
            if len(there) == 3 and joinable(there):
                found[f"{stem}.self_attn.qkv_proj.weight"] = joined(there)
        if facts.family.experts:
            whole = f"{stem}.mlp.experts.gate_up_proj"
            gate, up = (found.pop(f"{whole}:{part}", None) for part in ("ffn_gate_exps", "ffn_up_exps"))
            if gate is not None and up is not None and joinable([gate, up]) and gate.shape == up.shape:
                found[whole] = _beside(gate, up)
    return found


def _beside(gate: QuantizedMatrix, up: QuantizedMatrix) -> QuantizedMatrix:
    """Experts `[E, 2 N, K]` of experts `[E, N, K]`: of each the rows of `gate`, then those of `up`."""
    experts, rows, columns = gate.shape
    both = joined([gate, up])
    order = np.arange(2 * experts * rows).reshape(2, experts, rows).swapaxes(0, 1).reshape(-1)
    parts = [some_rows(both, int(start), int(start) + rows) for start in order[::rows]]
    return joined(parts, (experts, 2 * rows, columns))
