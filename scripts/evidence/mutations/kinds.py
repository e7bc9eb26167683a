"""The kinds of damage: one line each, by what an exporter gets wrong. Layer 1 is the one that is broken."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from evidence.mutations import of_quantized
from evidence.mutations.mutation import Broken, Mutation, NotHere
from evidence.mutations.of_caches import CACHE_MUTATIONS
from evidence.mutations.of_chunks import CHUNK_MUTATIONS
from evidence.mutations.of_floats import FLOAT_MUTATIONS
from evidence.mutations.of_rings import RING_MUTATIONS
from evidence.mutations.of_rotary import (
    positions_clamped,
    rotary_backwards,
    rotary_dropped,
    rotary_flipped,
    rotary_positions_shifted,
    tables_in_fp16,
    tables_too_short,
    theta_changed,
)
from evidence.mutations.of_shared import SHARED_MUTATIONS
from evidence.mutations.of_states import STATE_MUTATIONS
from evidence.mutations.of_weights import (
    bias_dropped,
    embedding_row,
    head_row,
    heads_regrouped,
    kv_heads_swapped,
    layers_exchanged,
    norm_element,
    norms_shared,
    projection_transposed,
    projections_exchanged,
    query_norm_dropped,
    weight_row,
)
from gqa_export.graph_io import present_names

L = 1


def _windowed(broken: Broken) -> tuple:
    for layer in broken.manifest.spec.layers[L:]:
        if layer.window:
            return broken.attribute(broken.attention(layer.layer), "local_window_size", "window"), layer
    raise NotHere("window")


def window_longer(broken: Broken) -> None:
    """One token more is visible."""
    _windowed(broken)[0].i += 1


def window_shorter(broken: Broken) -> None:
    """One token less is visible."""
    _windowed(broken)[0].i -= 1


def window_dropped(broken: Broken) -> None:
    """Every token is visible."""
    attribute, _ = _windowed(broken)
    attribute.i = -1 if attribute.name == "local_window_size" else 0


def window_invented(broken: Broken) -> None:
    """A layer that sees everything gets a window."""
    if broken.manifest.spec.layers[L].window:
        raise NotHere("a layer without a window")
    broken.attribute(broken.attention(L), "local_window_size", "window").i = 20


def scale_dropped(broken: Broken) -> None:
    """No factor on the dot products."""
    broken.attribute(broken.attention(L), "scale").f = 1.0


def scale_wrong(broken: Broken) -> None:
    """A head size guessed: the factor is some per cent off."""
    broken.attribute(broken.attention(L), "scale").f *= 1.05


def softcap_dropped(broken: Broken) -> None:
    """Scores are not capped."""
    softcap = broken.attribute(broken.attention(L), "softcap")
    if not softcap.f:
        raise NotHere("softcap")
    softcap.f = 0.0


def sinks_zeroed(broken: Broken) -> None:
    """A sink of zero still takes its share."""
    name = broken.weight_name(f"layers.{L}.", "sinks")
    broken.write(name, np.zeros_like(broken.read(name)))


def sinks_dropped(broken: Broken) -> None:
    """No sinks at all."""
    node = broken.attention(L)
    if len(node.input) < 12 or not node.input[11]:
        raise NotHere("sinks")
    del node.input[9:]


def presents_exchanged(broken: Broken) -> None:
    """Two layers' keys under each other's name."""
    first, second = broken.attention(L), broken.attention(L + 1)
    first.output[1], second.output[1] = second.output[1], first.output[1]


def key_value_exchanged(broken: Broken) -> None:
    """A layer's keys under its values' name."""
    node = broken.attention(L)
    node.output[1], node.output[2] = node.output[2], node.output[1]


def newest_row_lost(broken: Broken) -> None:
    """The cache keeps what was there and not the newest token's keys."""
    if broken.manifest.cache != "growing":
        raise NotHere("a growing cache")
    tensor = present_names(L)[0]
    zero, minus, axis = (broken.constant(f"broken/{name}", np.array([value], np.int64))
                         for name, value in (("zero", 0), ("minus", -1), ("axis", 2)))
    pads = broken.constant("broken/pads", np.array([0, 1], np.int64))
    pad = broken.after(tensor, "Pad", [f"{tensor}/cut", pads, "", axis])
    pad.input[2] = ""  # the value to pad with: zero
    broken.before(pad, helper.make_node("Slice", [f"{tensor}/unbroken", zero, minus, axis], [f"{tensor}/cut"],
                                        name="broken/cut"))


def stale_tail(broken: Broken) -> None:
    """Every row of a batch is as long as the longest: the shorter ones read what lies beyond their end."""
    total, none = broken.node("lengths/ReduceSum_0").output[0], broken.constant("broken/none", np.array(0, np.int64))
    axis = broken.constant("broken/rows", np.array([0], np.int64))
    all_rows = broken.after(total, "Add", [f"{total}/zeros", f"{total}/longest"])
    broken.before(all_rows,
                  helper.make_node("ReduceMax", [f"{total}/unbroken", axis], [f"{total}/longest"], keepdims=1),
                  helper.make_node("Mul", [f"{total}/unbroken", none], [f"{total}/zeros"]))


def past_one_short(broken: Broken) -> None:
    """past_lengths one too small, from the second step on."""
    past = broken.node("graph/Cast_0", op="Cast").output[0]
    one = broken.constant("broken/one", np.array(1, np.int32))
    none = broken.constant("broken/none", np.array(0, np.int32))
    less = broken.after(past, "Max", [f"{past}/less", none])
    broken.before(less, helper.make_node("Sub", [f"{past}/unbroken", one], [f"{past}/less"], name="broken/Sub"))


def mask_upper_left(broken: Broken) -> None:
    """The triangle of the mask starts at the first key instead of ending at the last."""
    row = broken.node("lengths/position/row", op="Add")
    past, none = row.input[0], broken.constant("broken/none", np.array(0, np.int64))
    row.input[0] = "broken/past"
    broken.before(row, helper.make_node("Mul", [past, none], ["broken/past"], name="broken/Mul"))


def detour_in_fp16(broken: Broken) -> None:
    """An activation goes through half precision."""
    tensor = broken.node(f"layers.{L}.mlp.down_proj", "MatMul").output[0]
    back = broken.after(tensor, "Cast", [f"{tensor}/half"], {"to": TensorProto.FLOAT})
    broken.before(back, helper.make_node("Cast", [f"{tensor}/unbroken"], [f"{tensor}/half"], name="broken/half",
                                         to=TensorProto.FLOAT16))


def rows_leak(broken: Broken) -> None:
    """Rows of a batch are averaged a little."""
    tensor = broken.node(f"layers.{L}.mlp.down_proj", "MatMul").output[0]
    axis = broken.constant("broken/rows", np.array([0], np.int64))
    share = broken.constant("broken/share", np.array(0.01, np.float32))
    mix = broken.after(tensor, "Add", ["", f"{tensor}/leak"])
    broken.before(
        mix, helper.make_node("ReduceMean", [f"{tensor}/unbroken", axis], [f"{tensor}/mean"], name="broken/mean"),
        helper.make_node("Sub", [f"{tensor}/mean", f"{tensor}/unbroken"], [f"{tensor}/gap"], name="broken/gap"),
        helper.make_node("Mul", [f"{tensor}/gap", share], [f"{tensor}/leak"], name="broken/leak"))


def guard_dropped(broken: Broken) -> None:
    """Left padding is answered."""
    guard = broken.node("guard/Where", op="Where")
    for node in broken.model.graph.node:
        for place, name in enumerate(node.input):
            if name == guard.output[0]:
                node.input[place] = guard.input[1]


def whole_rows_refused(broken: Broken) -> None:
    """The guard takes no mask that has all ones of a row first."""
    either = broken.node("guard/Or", op="Or")
    either.input[1] = either.input[0]


def whole_rows_miscounted(broken: Broken) -> None:
    """Positions outside attention count the new tokens in the mask's last columns only."""
    counted = broken.node("guard/new_tokens/Where", op="Where")
    counted.input[1] = counted.input[2]


def final_softcap_dropped(broken: Broken) -> None:
    """The cap on the logits."""
    last = next((node for node in reversed(broken.nodes) if node.op_type == "Tanh"), None)
    if last is None:
        raise NotHere("a cap on the logits")
    last.op_type = "Identity"


def activation_exchanged(broken: Broken) -> None:
    """SiLU's sigmoid takes GELU's factor."""
    alpha = broken.attribute(broken.node(f"layers.{L}.mlp.act_fn", op="QuickGelu"), "alpha")
    alpha.f = 1.702


def residual_dropped(broken: Broken) -> None:
    """The sum around the attention is lost."""
    norm = broken.node(f"layers.{L}.post_attention_layernorm", op="SkipSimplifiedLayerNormalization")
    zero = broken.constant("broken/zero", np.array(0, np.float32))
    lost = norm.input[1]
    norm.input[1] = "broken/nothing"
    broken.before(norm, helper.make_node("Mul", [lost, zero], ["broken/nothing"], name="broken/Mul"))


def epsilon_changed(broken: Broken) -> None:
    """Another epsilon under the norm's root."""
    broken.attribute(broken.node(f"layers.{L}.post_attention_layernorm"), "epsilon").f *= 1000


ATTENTION = ("self_attn.attention",)
MUTATIONS: tuple[Mutation, ...] = (
    Mutation("window longer", "window off by one: one token more", window_longer, L, ATTENTION, "window"),
    Mutation("window shorter", "window off by one: one token less", window_shorter, L, ATTENTION, "window"),
    Mutation("window dropped", "a sliding window that is ignored", window_dropped, L, ATTENTION, "window"),
    Mutation("window invented", "a full layer treated as a sliding one", window_invented, L, ATTENTION, "window"),
    Mutation("scale dropped", "scores not scaled", scale_dropped, L, ATTENTION, "scale"),
    Mutation("scale wrong", "a head size guessed", scale_wrong, L, ATTENTION, "scale"),
    Mutation("softcap dropped", "attention softcap ignored", softcap_dropped, L, ATTENTION, "softcap"),
    Mutation("interleaving flipped", "rotary pairs for halves", rotary_flipped, L, ("self_attn.key",), "rotation"),
    Mutation("rotary dropped", "queries and keys not rotated", rotary_dropped, L, ("self_attn.key",), "rotation"),
    Mutation("theta changed", "another rotary base", theta_changed, L, ("self_attn.key",), "rotation"),
    Mutation("rotary backwards", "the sign of the sine", rotary_backwards, L, ("self_attn.key",), "rotation"),
    Mutation("positions from one", "positions shifted by one", rotary_positions_shifted, L, ("self_attn.key",),
             "rotation"),
    Mutation("cos, sin in fp16", "rotary tables in half precision", tables_in_fp16, L, ("self_attn.key",),
             "rotation"),
    Mutation("positions clamped", "rotary scaling's original length as a limit", positions_clamped, L,
             ("self_attn.key",), "rotation"),
    Mutation("tables too short", "rotary tables shorter than the capacity", tables_too_short, L, ("self_attn.key",),
             "rotation"),
    Mutation("sinks zeroed", "attention sinks of zero", sinks_zeroed, L, ATTENTION, "sinks"),
    Mutation("sinks dropped", "attention sinks ignored", sinks_dropped, L, ATTENTION, "sinks"),
    Mutation("KV heads swapped", "two key/value heads exchanged", kv_heads_swapped, L,
             ("self_attn.k_proj", "self_attn.key"), "head order"),
    Mutation("heads regrouped", "query heads dealt to the groups in turn", heads_regrouped, L,
             ("self_attn.q_proj", "self_attn.attention"), "head order"),
    Mutation("weight row", "one row of a matrix one per cent off", weight_row, L, ("self_attn.o_proj",), "row"),
    Mutation("transposed", "a square matrix transposed", projection_transposed, L, ("self_attn.o_proj",),
             "transposed"),
    Mutation("bias dropped", "a projection's bias lost", bias_dropped, L,
             ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.value"), ""),
    Mutation("q norm dropped", "the norm of the queries ignored", query_norm_dropped, L,
             ("self_attn.q_norm", "self_attn.attention"), ""),
    Mutation("gate and up exchanged", "two matrices of one shape", projections_exchanged, L,
             ("mlp.gate_proj", "mlp.act_fn"), ""),
    Mutation("layers exchanged", "two layers' weights in the wrong order", layers_exchanged, 0,
             ("mlp.gate_proj", "mlp.act_fn"), ""),
    Mutation("norm element", "one element of a norm's weight", norm_element, L, ("input_layernorm",), ""),
    Mutation("norms shared", "equal-looking norms merged into one", norms_shared, L, ("input_layernorm",), ""),
    Mutation("epsilon", "another epsilon in a norm", epsilon_changed, L, ("post_attention_layernorm",), ""),
    Mutation("residual dropped", "a sum lost in a fusion", residual_dropped, L, ("post_attention_layernorm",), ""),
    Mutation("activation", "another activation function", activation_exchanged, L, ("mlp.act_fn",), ""),
    Mutation("fp16 detour", "an activation through half precision", detour_in_fp16, L, ("mlp.down_proj", "mlp"),
             "precision"),
    Mutation("rows leak", "rows of a batch influence each other", rows_leak, L, ("mlp.down_proj", "mlp"), ""),
    Mutation("presents exchanged", "two layers' caches under each other's name", presents_exchanged, L,
             ("self_attn.key",), ""),
    Mutation("key and value exchanged", "keys under the values' name", key_value_exchanged, L, ("self_attn.key",), ""),
    Mutation("newest row lost", "a stale cache: the newest token is not in it", newest_row_lost, L,
             ("self_attn.key",), ""),
    Mutation("stale tail", "short rows of a batch read beyond their end", stale_tail, -1),
    Mutation("past one short", "past_lengths off by one", past_one_short, -1),
    Mutation("mask upper-left", "the causal triangle in the wrong corner", mask_upper_left, -1),
    Mutation("embedding row", "one row of the embedding damaged", embedding_row, -1),
    Mutation("head row", "one row of the last matrix damaged", head_row, -1),
    Mutation("final softcap dropped", "the cap on the logits ignored", final_softcap_dropped, -1),
    Mutation("guard dropped", "left padding answered with plausible numbers", guard_dropped, -1),
    Mutation("whole rows refused", "the masks of onnxruntime-genai's Engine taken for left padding",
             whole_rows_refused, -1),
    Mutation("whole rows miscounted", "positions shifted under the masks of onnxruntime-genai's Engine",
             whole_rows_miscounted, -1),
    *CHUNK_MUTATIONS,
    *STATE_MUTATIONS,
    *of_quantized.MUTATIONS,
    *FLOAT_MUTATIONS,
    *CACHE_MUTATIONS,
    *RING_MUTATIONS,
    *SHARED_MUTATIONS,
)
