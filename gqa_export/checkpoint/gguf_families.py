"""The architectures whose GGUF files are read: llama.cpp's names of their tensors beside transformers'.

Source: `src/models/*.cpp` (what llama.cpp computes from a file) and `conversion/*.py` (what its converter writes) in
https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ATTENTION = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj"}
GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
FOUR_NORMS = {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
              "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
EXPERTS = {"ffn_gate_inp": "mlp.gate", "ffn_down_exps": "mlp.experts.down_proj",
           "ffn_gate_exps": "mlp.experts.gate_up_proj", "ffn_up_exps": "mlp.experts.gate_up_proj"}
SHARED = {"ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
          "ffn_down_shexp": "mlp.shared_expert.down_proj", "ffn_gate_inp_shexp": "mlp.shared_expert_gate"}
QKV = ("attn_q", "attn_k", "attn_v")
FFN = ("ffn_gate", "ffn_up", "ffn_down")
GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class Family:
    """One architecture of llama.cpp.

    Attributes:
        model_type: transformers' name of it.
        model_class: the class of transformers.
        layer: tensors of a layer, without `blk.N.` and `.weight`, by llama.cpp's names -> transformers' names.
        epsilon: the key of the norms' epsilon, and the field it goes to.
        constants: fields that nothing in a file says.
        biases: (field that switches them on, or "" if they are always there; tensors that have them then). Those
            that a file lacks while it has others of the group are zero.
        layer_norm: the norms have biases.
        norm_offset: what the file adds to the weights of norms.
        paired: queries and keys are stored in the order in which llama.cpp rotates neighbours.
        joined: transformers has queries, keys and values in one matrix.
        partial: part of a head may be rotated.
        own_head_size: a head may have another size than hidden / heads.
        rope_tensors: tensors that scale the rotary frequencies are read.
        experts: the feed-forward part is a mixture of experts.
        shared_expert: one expert beside them sees every token.
        windows: (window where the file says none, every which layer sees everything): windows alternate. None: all
            layers are alike.
        softcaps: (of scores, of logits) where the file says none; None: it never has them.
        large: so many layers have queries scaled by hidden / heads.
        local_rope: layers with a window have a rotary embedding of their own.
        longrope_alone: of scaled rotary embeddings transformers has LongRoPE alone.
        heads_normed_apart: every head of queries and keys may have a norm of its own, and layers may lack the norm
            before their feed-forward part.
    """

    model_type: str
    model_class: str
    layer: Mapping[str, str]
    epsilon: tuple[str, str] = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
    constants: Mapping[str, Any] = field(default_factory=dict)
    biases: tuple[tuple[str, tuple[str, ...]], ...] = ()
    layer_norm: bool = False
    norm_offset: float = 0.0
    paired: bool = False
    joined: bool = False
    partial: bool = False
    own_head_size: bool = True
    rope_tensors: bool = True
    experts: bool = False
    shared_expert: bool = False
    windows: tuple[int, int] | None = None
    softcaps: tuple[float | None, float | None] = (None, None)
    large: int = 0
    local_rope: bool = False
    longrope_alone: bool = False
    heads_normed_apart: bool = False


_ALL_ATTENTION = ("attention_bias", tuple(ATTENTION))
_SILU = {"hidden_act": "silu"}
_NO_WINDOW = {"use_sliding_window": False, "sliding_window": None}
_GEMMA: dict[str, Any] = {"norm_offset": 1.0, "rope_tensors": False, "biases": (_ALL_ATTENTION,)}
_QWEN_MOE: dict[str, Any] = {**_SILU, **_NO_WINDOW, "decoder_sparse_step": 1, "mlp_only_layers": []}

FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", {**ATTENTION, **GATED, **NORMS}, constants=_SILU, paired=True,
                    biases=(_ALL_ATTENTION, ("mlp_bias", FFN))),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", {**ATTENTION, **GATED, **NORMS}, biases=(("", QKV),),
                    constants={**_SILU, **_NO_WINDOW}),
    "qwen2moe": Family("qwen2_moe", "Qwen2MoeForCausalLM", {**ATTENTION, **EXPERTS, **SHARED, **NORMS},
                       biases=(("qkv_bias", QKV),), experts=True, shared_expert=True,
                       constants={**_QWEN_MOE, "norm_topk_prob": False}),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", {**ATTENTION, **GATED, **NORMS, **HEAD_NORMS},
                    biases=(_ALL_ATTENTION,), constants={**_SILU, **_NO_WINDOW}),
    "qwen3moe": Family("qwen3_moe", "Qwen3MoeForCausalLM", {**ATTENTION, **EXPERTS, **NORMS, **HEAD_NORMS},
                       biases=(_ALL_ATTENTION,), experts=True, constants={**_QWEN_MOE, "norm_topk_prob": True}),
    "phi3": Family("phi3", "Phi3ForCausalLM",
                   {**ATTENTION, "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj", **NORMS},
                   constants=_SILU, joined=True, partial=True, own_head_size=False, longrope_alone=True),
    "gemma": Family("gemma", "GemmaForCausalLM", {**ATTENTION, **GATED, **NORMS},
                    constants={"hidden_act": "gelu_pytorch_tanh"}, **_GEMMA),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", {**ATTENTION, **GATED, **FOUR_NORMS},
                     constants={"hidden_activation": "gelu_pytorch_tanh"}, windows=(4096, 2), softcaps=(50.0, 30.0),
                     large=46, **_GEMMA),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", {**ATTENTION, **GATED, **FOUR_NORMS, **HEAD_NORMS},
                     constants={"hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None},
                     windows=(0, 6), softcaps=(None, 0.0), large=62, local_rope=True, **_GEMMA),
    "starcoder2": Family("starcoder2", "Starcoder2ForCausalLM",
                         {**ATTENTION, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj", **NORMS},
                         epsilon=("attention.layer_norm_epsilon", "norm_epsilon"), layer_norm=True,
                         biases=(("use_bias", (*ATTENTION, "ffn_up", "ffn_down")),),
                         constants={"hidden_act": "gelu_pytorch_tanh", "sliding_window": None}),
    "stablelm": Family("stablelm", "StableLmForCausalLM",
                       {**ATTENTION, **GATED, **NORMS, "attn_q_norm": "self_attn.q_layernorm",
                        "attn_k_norm": "self_attn.k_layernorm"},
                       epsilon=("attention.layer_norm_epsilon", "layer_norm_eps"), layer_norm=True, partial=True,
                       own_head_size=False, heads_normed_apart=True, biases=(("use_qkv_bias", QKV),),
                       constants=_SILU),
    "nemotron": Family("nemotron", "NemotronForCausalLM",
                       {**ATTENTION, "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", **NORMS},
                       epsilon=("attention.layer_norm_epsilon", "norm_eps"), layer_norm=True, norm_offset=1.0,
                       partial=True, biases=(_ALL_ATTENTION, ("mlp_bias", ("ffn_up", "ffn_down"))),
                       constants={"hidden_act": "relu2"}),
}
