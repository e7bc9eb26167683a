"""Damage to weights: heads, rows and matrices exchanged, as name mapping and fusions get them wrong."""

from __future__ import annotations

import numpy as np

from evidence.mutations.mutation import Broken, NotHere

L = 1


def _rows(broken: Broken, which: str) -> tuple[str, slice]:
    """The initializer that holds a projection of layer 1 ("q", "k" or "v"), and its rows there; packed or not."""
    layer = broken.manifest.spec.layers[L]
    sizes = {"q": layer.num_heads * layer.head_size, "k": layer.kv_num_heads * layer.head_size,
             "v": layer.kv_num_heads * layer.value_head_size}
    for name in (tensor.name for tensor in broken.model.graph.initializer):
        if f"layers.{L}." in name and name.endswith(f"{which}_proj.weight"):
            return name, slice(0, sizes[which])
    packed = broken.weight_name(f"layers.{L}.", "qkv", "weight")
    if broken.read(packed).shape[0] != sum(sizes.values()):
        raise NotHere("projections stored as rows")
    start = {"q": 0, "k": sizes["q"], "v": sizes["q"] + sizes["k"]}[which]
    return packed, slice(start, start + sizes[which])


def _reorder(broken: Broken, which: str, heads: int, order) -> None:
    name, rows = _rows(broken, which)
    values = broken.read(name)
    part = values[rows].reshape(heads, -1, values.shape[1])
    values[rows] = part[order].reshape(values[rows].shape)
    broken.write(name, values)


def kv_heads_swapped(broken: Broken) -> None:
    """Key/value heads 0 and 1 change places."""
    heads = broken.manifest.spec.layers[L].kv_num_heads
    if heads < 2:
        raise NotHere("two key/value heads")
    for which in "kv":
        _reorder(broken, which, heads, [1, 0, *range(2, heads)])


def heads_regrouped(broken: Broken) -> None:
    """Query head h reads key/value head h mod K instead of h div (H / K)."""
    layer = broken.manifest.spec.layers[L]
    heads, groups = layer.num_heads, layer.kv_num_heads
    if groups in (1, heads):
        raise NotHere("groups of heads")
    _reorder(broken, "q", heads, np.arange(heads).reshape(-1, groups).T.ravel())


def weight_row(broken: Broken) -> None:
    """One row of the output projection, by one per cent."""
    name = broken.weight_name(f"layers.{L}.", "o_proj.weight")
    values = broken.read(name)
    values[5] *= 1.01
    broken.write(name, values)


def projection_transposed(broken: Broken) -> None:
    """The output projection, if it is square."""
    name = broken.weight_name(f"layers.{L}.", "o_proj.weight")
    values = broken.read(name)
    if values.shape[0] != values.shape[1]:
        raise NotHere("a square matrix")
    broken.write(name, values.T)


def bias_dropped(broken: Broken) -> None:
    """The biases of layer 1's query, key and value projections."""
    found = [tensor.name for tensor in broken.model.graph.initializer
             if f"layers.{L}.self_attn" in tensor.name and tensor.name.endswith("bias")]
    if not found:
        raise NotHere("a bias")
    broken.write(found[0], np.zeros_like(broken.read(found[0])))


def query_norm_dropped(broken: Broken) -> None:
    """The weight of layer 1's query norm becomes one."""
    name = broken.weight_name(f"layers.{L}.", "q_norm.weight")
    broken.write(name, np.ones_like(broken.read(name)))


def projections_exchanged(broken: Broken) -> None:
    """gate_proj and up_proj of layer 1."""
    _exchange(broken, broken.weight_name(f"layers.{L}.", "gate_proj.weight"),
              broken.weight_name(f"layers.{L}.", "up_proj.weight"))


def layers_exchanged(broken: Broken) -> None:
    """The MLP matrices of layers 0 and 1."""
    for part in ("gate_proj", "up_proj", "down_proj"):
        _exchange(broken, broken.weight_name("layers.0.", f"{part}.weight"),
                  broken.weight_name(f"layers.{L}.", f"{part}.weight"))


def _exchange(broken: Broken, one: str, other: str) -> None:
    first, second = broken.read(one), broken.read(other)
    broken.write(one, second)
    broken.write(other, first)


def norm_element(broken: Broken) -> None:
    """One element of layer 1's input norm."""
    name = broken.weight_name(f"layers.{L}.input_layernorm", "weight")
    values = broken.read(name)
    values[3] += 0.01
    broken.write(name, values)


def norms_shared(broken: Broken) -> None:
    """Layer 1's input norm becomes layer 0's."""
    broken.write(broken.weight_name(f"layers.{L}.input_layernorm", "weight"),
                 broken.read(broken.weight_name("layers.0.input_layernorm", "weight")))


def embedding_row(broken: Broken) -> None:
    """The row of the end token, which random prompts avoid."""
    token = broken.manifest.tokens.get("eos")
    token = token[0] if isinstance(token, list) else token
    name = broken.weight_name("embed_tokens.weight")
    if any(tensor.name == "lm_head.weight" for tensor in broken.model.graph.initializer) and token is not None:
        values = broken.read(name)
        values[token] *= 1.05
        broken.write(name, values)
        return
    raise NotHere("an embedding of its own")


def head_row(broken: Broken) -> None:
    """One row of the last matrix."""
    name = broken.weight_name("lm_head.weight")
    values = broken.read(name)
    values[values.shape[0] // 3] *= 1.01
    broken.write(name, values)
