"""The tensors of a GGUF file -> the state of transformers' model: names, order of rows, and what is stored shifted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .gguf_facts import GgufFacts
from .gguf_families import GLOBAL, QKV
from .gguf_names import JOINED, place_of
from .gguf_rope import ROPE_TENSORS
from .gguf_values import read_values

if TYPE_CHECKING:
    import torch

Array = Any
"""a float32 or float64 array"""


def gguf_state(facts: GgufFacts, exact: bool = False) -> dict[str, torch.Tensor]:
    """Every tensor of the model under transformers' name: matrices dequantized to float32 (exact: to float64) or as
    stored, what has one dimension in float32.

    Biases that only some matrices of a group have are zero for the others: transformers has one switch for a group.
    """
    return _state(facts, exact, frozenset())


def gguf_plain(facts: GgufFacts, packed: frozenset[str]) -> dict[str, torch.Tensor]:
    """As `gguf_state`, without the tensors of the file that are `packed`: those that quantized weights are made of."""
    return _state(facts, False, packed)


def _state(facts: GgufFacts, exact: bool, packed: frozenset[str]) -> dict[str, torch.Tensor]:
    import numpy as np
    import torch

    dtype = torch.float64 if exact else getattr(torch, facts.header.stored_dtype)
    arrays = _arrays(facts, "float64" if exact else "float32", packed)
    state = _joined(facts, {name: torch.from_numpy(np.ascontiguousarray(values)).to(
        dtype if values.ndim > 1 else torch.float32) for name, values in arrays})
    if "output.weight" not in facts.header.tensors and "model.embed_tokens.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def _arrays(facts: GgufFacts, dtype: str, packed: frozenset[str]) -> Iterator[tuple[str, Array]]:
    """Tensors under transformers' names; queries, keys and values apart, and so the parts of joined experts."""
    import numpy as np

    biased = set()
    for name in facts.header.tensors:
        place = place_of(facts, name)
        if name in ROPE_TENSORS or place is None or name in packed:
            continue
        values = read_values(facts.header, name, dtype)
        if place.layer is None:
            yield f"{GLOBAL[place.stem]}.{place.suffix}", _shifted(facts, place.stem, place.suffix, values)
            continue
        parts = dict(zip(QKV, np.split(values, np.cumsum(facts.split_rows)[:2]))) if place.stem == JOINED and \
            values.shape[0] == sum(facts.split_rows) else {place.stem: values}
        for stem, part in parts.items():
            if place.suffix == "bias":
                biased.add((place.layer, stem))
            yield from _layer_tensor(facts, place.layer, stem, place.suffix, part)
    yield from _zero_biases(facts, biased)


def _layer_tensor(facts: GgufFacts, layer: int, stem: str, suffix: str, values: Array) -> Iterator[tuple[str, Array]]:
    name = f"model.layers.{layer}.{facts.family.layer.get(stem, stem)}"
    if facts.family.paired and stem in ("attn_q", "attn_k"):
        values = _halves(values, facts.heads if stem == "attn_q" else facts.kv_heads)
    values = _shifted(facts, stem, suffix, values)
    if facts.family.heads_normed_apart and stem in ("attn_q_norm", "attn_k_norm"):
        for head, row in enumerate(values.reshape(-1, facts.head_size)):
            yield f"{name}.norms.{head}.{suffix}", row
    elif stem == "ffn_gate_inp_shexp":
        yield f"{name}.{suffix}", values.reshape(1, -1)
    elif stem in ("ffn_gate_exps", "ffn_up_exps"):
        yield f"{name}:{stem}", values
    else:
        yield name if stem == "ffn_down_exps" else f"{name}.{suffix}", values


def _halves(values: Array, heads: int) -> Array:
    """Rows of a head from the order of rotated neighbours to that of rotated halves. Rows that do not fill the heads
    are left, for the check of the shapes to refuse."""
    if values.shape[0] % (2 * heads):
        return values
    return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _shifted(facts: GgufFacts, stem: str, suffix: str, values: Array) -> Array:
    """The weights of norms without what the file adds to them."""
    return values - values.dtype.type(facts.family.norm_offset) if stem.endswith("norm") and suffix == "weight" \
        else values


def _zero_biases(facts: GgufFacts, biased: set[tuple[int, str]]) -> Iterator[tuple[str, Array]]:
    import numpy as np

    width = facts.integer("feed_forward_length", 0, 0)
    rows = {**dict(zip(QKV, facts.split_rows)), "attn_output": facts.hidden, "ffn_down": facts.hidden,
            "ffn_gate": width, "ffn_up": width}
    for field, stems in facts.family.biases:
        if field and not any(stem in stems for _, stem in biased):
            continue
        for layer in range(facts.layers):
            for stem in stems:
                if (layer, stem) not in biased:
                    yield (f"model.layers.{layer}.{facts.family.layer[stem]}.bias", np.zeros(rows[stem], np.float32))


def _joined(facts: GgufFacts, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices that transformers has as one."""
    import torch

    def together(names: list[str], whole: str, axis: int) -> None:
        parts = [state.pop(name) for name in names if name in state]
        if parts:
            state[whole] = torch.cat(parts, axis)

    for layer in range(facts.layers):
        stem = f"model.layers.{layer}"
        if facts.family.joined:
            together([f"{stem}.self_attn.{part}_proj.weight" for part in "qkv"],
                     f"{stem}.self_attn.qkv_proj.weight", 0)
        if facts.family.experts:
            whole = f"{stem}.mlp.experts.gate_up_proj"
            together([f"{whole}:ffn_gate_exps", f"{whole}:ffn_up_exps"], whole, 1)
    return state
