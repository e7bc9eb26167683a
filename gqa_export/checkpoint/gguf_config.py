"""The configuration in a GGUF file, as transformers would have it in config.json: everything from the file itself."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from .gguf_facts import GgufFacts
from .gguf_keys import check_keys, query_scale
from .gguf_names import check_tensors
from .gguf_parts import read_gguf
from .gguf_rope import rope_parameters

END_TOKENS = ("eos", "eot", "eom")
"""tokens that end a text, a turn, a message: llama.cpp stops at each of them"""


def gguf_facts(path: Path) -> GgufFacts:
    """A GGUF model's header, checked whole: every key and every tensor of it is one that the configuration and the
    loader use.

    Args:
        path: the file, or one of its parts.

    Raises:
        InvalidCheckpoint: the file is damaged, lacks hyperparameters or parts, or has senseless values.
        UnsupportedModel: it holds what cannot be applied; the message has the name of the key or tensor.
    """
    return _facts(identity(path), path)


def identity(path: Path) -> tuple[tuple[str, int], ...]:
    """What tells a GGUF model from another, or from an older one: the files of its folder that may be its parts, and
    when each was changed."""
    files = sorted({path, *path.parent.glob("*.gguf")}) if path.is_file() else [path]
    return tuple((str(file.absolute()), file.stat().st_mtime_ns if file.is_file() else 0) for file in files)


@lru_cache(maxsize=1)
def _facts(files: tuple[tuple[str, int], ...], path: Path) -> GgufFacts:
    facts = GgufFacts(read_gguf(path))
    check_keys(facts)
    check_tensors(facts)
    return facts


def gguf_config(facts: GgufFacts) -> dict[str, Any]:
    """The configuration in a GGUF file, as a dict like that of config.json.

    Raises:
        InvalidCheckpoint: a value is senseless.
        UnsupportedModel: the file asks for a rotary embedding that transformers does not have.
    """
    family, layers = facts.family, facts.layers
    config: dict[str, Any] = {
        "architectures": [family.model_class], "model_type": family.model_type, "vocab_size": facts.vocabulary,
        "hidden_size": facts.hidden, "num_hidden_layers": layers, "num_attention_heads": facts.heads,
        "num_key_value_heads": facts.kv_heads, "max_position_embeddings": facts.integer("context_length"),
        family.epsilon[1]: facts.real(family.epsilon[0], 0.0), "rope_parameters": rope_parameters(facts),
        "tie_word_embeddings": "output.weight" not in facts.header.tensors, "attention_dropout": 0.0,
        **family.constants, **_tokens(facts),
    }
    if (width := facts.integer("feed_forward_length", 0, 0)) or not family.experts:
        config["intermediate_size"] = width
    if family.own_head_size:
        config["head_dim"] = facts.head_size
    for name, stems in family.biases:
        if name:
            config[name] = facts.layer_has(*stems, suffix="bias")
    return {**config, **_own_fields(facts)}


def _own_fields(facts: GgufFacts) -> dict[str, Any]:
    """Fields that only some architectures have."""
    family, fields = facts.family, dict[str, Any]()
    if family.longrope_alone:
        fields["sliding_window"] = facts.integer("attention.sliding_window", 0, 0) or None
        fields["original_max_position_embeddings"] = facts.integer("rope.scaling.original_context_length",
                                                                   facts.integer("context_length"))
    if family.heads_normed_apart:
        fields["use_parallel_residual"] = not facts.layer_has("ffn_norm", suffix="weight")
        fields["qk_layernorm"] = facts.layer_has("attn_q_norm", suffix="weight")
    if family.windows is not None:
        fields |= _windows(facts, *family.windows)
    for name, default in zip(("attn_logit_softcapping", "final_logit_softcapping"), family.softcaps):
        if default is not None:
            fields[name] = facts.real(name, default) or None
    if family.experts:
        used, width = facts.integer("expert_used_count"), facts.integer("feed_forward_length", 0, 0)
        fields |= {"num_experts": facts.integer("expert_count"), "num_experts_per_tok": used,
                   "moe_intermediate_size": facts.integer("expert_feed_forward_length", width // used)}
    if family.shared_expert:
        fields["shared_expert_intermediate_size"] = facts.integer("expert_shared_feed_forward_length",
                                                                  facts.integer("feed_forward_length", 0, 0))
    return fields


def _windows(facts: GgufFacts, window: int, every: int) -> dict[str, Any]:
    """Layers with a window between layers without; `window` and `every` where the file says nothing."""
    window = facts.integer("attention.sliding_window", window, 0)
    pattern = facts.header.about_model("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        local = [bool(value) for value in pattern]
        if len(local) != facts.layers:
            raise facts.senseless("attention.sliding_window_pattern", pattern, f"{facts.layers} values")
    else:
        every = facts.integer("attention.sliding_window_pattern", every, 0)
        local = [every == 0 or layer % every < every - 1 for layer in range(facts.layers)]
    return {"sliding_window": window or facts.integer("context_length"), "query_pre_attn_scalar": query_scale(facts),
            "layer_types": ["sliding_attention" if window and here else "full_attention" for here in local]}


def _tokens(facts: GgufFacts) -> dict[str, Any]:
    """The special tokens; ids beyond the vocabulary mean none, as in llama.cpp."""
    def token(name: str) -> int | None:
        value = facts.header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int and 0 <= value < facts.vocabulary else None

    ends = [value for value in dict.fromkeys(map(token, END_TOKENS)) if value is not None]
    return {"bos_token_id": token("bos"), "pad_token_id": token("padding"),
            "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None}
