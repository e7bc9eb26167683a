"""Every key `<architecture>.*` that a GGUF file may have: what is made of it, or why it changes nothing.

A key that is not here is refused by its name: it may be what makes the model another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import UnsupportedModel
from .gguf_facts import FIX_ORIGINAL, GgufFacts

ANY: tuple[str, ...] = ()
_GEMMAS = ("gemma2", "gemma3")
_PARTIAL = ("phi3", "stablelm", "nemotron")
_YARN = ("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "starcoder2", "stablelm",
         "nemotron")
_EXPERTS = ("qwen2moe", "qwen3moe")


class Applied(NamedTuple):
    """A key whose value goes into the configuration of these architectures (`ANY`: all)."""

    families: tuple[str, ...] = ANY


class Checked(NamedTuple):
    """A key that says what the configuration says already; another value is refused."""

    expected: Callable[[GgufFacts], Any]


class Harmless(NamedTuple):
    """A key that changes nothing, and why."""

    why: str


def _head_size(facts: GgufFacts) -> int:
    return facts.head_size


def _rotated(facts: GgufFacts) -> int:
    return facts.rotated if facts.family.partial else facts.head_size


def _plain_head_size(facts: GgufFacts) -> int:
    return facts.hidden // facts.heads


Rule = Applied | Checked | Harmless
KEYS: dict[str, tuple[Rule, ...]] = {
    "block_count": (Applied(),),
    "context_length": (Applied(),),
    "embedding_length": (Applied(),),
    "feed_forward_length": (Applied(),),
    "attention.head_count": (Applied(),),
    "attention.head_count_kv": (Applied(),),
    "attention.key_length": (Applied(("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3",
                                      "starcoder2", "nemotron")), Checked(_plain_head_size)),
    "attention.value_length": (Checked(_head_size),),
    "attention.key_length_swa": (Checked(_head_size),),
    "attention.value_length_swa": (Checked(_head_size),),
    "attention.layer_norm_rms_epsilon": (Applied(("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "phi3", "gemma",
                                                  "gemma2", "gemma3")),
                                         Checked(lambda facts: facts.real(facts.family.epsilon[0], 0.0))),
    "attention.layer_norm_epsilon": (Applied(("starcoder2", "stablelm", "nemotron")),
                                     Checked(lambda facts: facts.real(facts.family.epsilon[0], 0.0))),
    "attention.sliding_window": (Applied(("phi3", "gemma2", "gemma3")), Checked(lambda facts: 0)),
    "attention.sliding_window_pattern": (Applied(_GEMMAS),),
    "attention.scale": (Checked(lambda facts: query_scale(facts) ** -0.5),),
    "attention.causal": (Checked(lambda facts: True),),
    "attn_logit_softcapping": (Applied(("gemma2",)), Checked(lambda facts: 0.0)),
    "final_logit_softcapping": (Applied(_GEMMAS), Checked(lambda facts: 0.0)),
    "rope.dimension_count": (Applied(_PARTIAL), Checked(_rotated)),
    "rope.dimension_count_swa": (Checked(_rotated),),
    "rope.freq_base": (Applied(),),
    "rope.freq_base_swa": (Applied(("gemma3",)), Checked(lambda facts: facts.real("rope.freq_base", 10000.0))),
    "rope.scaling.type": (Applied(),),
    "rope.scaling.factor": (Applied(),),
    "rope.scale_linear": (Applied(),),
    "rope.scaling.attn_factor": (Applied(),),
    "rope.scaling.original_context_length": (Applied(),),
    "rope.scaling.yarn_attn_factor": (Applied(_YARN),),
    "rope.scaling.yarn_beta_fast": (Applied(_YARN),),
    "rope.scaling.yarn_beta_slow": (Applied(_YARN),),
    "rope.scaling.yarn_ext_factor": (Checked(lambda facts: 1.0),),
    "rope.scaling.yarn_log_multiplier": (Checked(lambda facts: 0.0),),
    "rope.scaling.finetuned": (Harmless("it tells how the model was trained"),),
    "vocab_size": (Checked(lambda facts: facts.vocabulary),),
    "embedding_length_out": (Checked(lambda facts: facts.hidden),),
    "pooling_type": (Checked(lambda facts: 0),),
    "nextn_predict_layers": (Checked(lambda facts: 0),),
    "use_parallel_residual": (Harmless("a layer has a norm before its feed-forward part or has none, and llama.cpp "
                                       "goes by that: converted files say true of models that are not"),),
    "tensor_data_layout": (Checked(lambda facts: "Meta AI original pth"),),
    "expert_count": (Applied(_EXPERTS), Checked(lambda facts: 0)),
    "expert_used_count": (Applied(_EXPERTS), Checked(lambda facts: 0)),
    "expert_feed_forward_length": (Applied(_EXPERTS), Checked(lambda facts: 0)),
    "expert_shared_feed_forward_length": (Applied(("qwen2moe",)), Checked(lambda facts: 0)),
}


def query_scale(facts: GgufFacts) -> int:
    """Queries are divided by its square root. The 27B models of Gemma 2 and 3, which are told by their depth, have
    hidden / heads. Source: llama.cpp, `src/models/gemma2.cpp` and `gemma3.cpp`."""
    return facts.hidden // facts.heads if facts.layers == facts.family.large else facts.head_size


def check_keys(facts: GgufFacts) -> None:
    """Refuse every key of the architecture that is not in the table, and every one whose value is not the
    configuration's.

    Raises:
        UnsupportedModel: it names the key.
    """
    prefix = facts.full("")
    for key, value in facts.header.metadata.items():
        if not key.startswith(prefix):
            continue
        suffix = key.removeprefix(prefix)
        if suffix not in KEYS:
            raise UnsupportedModel(f"the GGUF file has {key} = {value!r}, and it is not known what that changes",
                                   facts.where, FIX_ORIGINAL, code="E-CKPT-GGUF-KEY")
        _check(facts, suffix, value)


def _check(facts: GgufFacts, suffix: str, value: Any) -> None:
    wanted = None
    for rule in KEYS[suffix]:
        if isinstance(rule, Harmless) or (isinstance(rule, Applied) and (
                not rule.families or facts.header.architecture in rule.families)):
            return
        if isinstance(rule, Checked) and _same(value, wanted := rule.expected(facts)):
            return
    instead = "without it" if wanted is None else f"with {wanted!r}"
    raise UnsupportedModel(f"the GGUF file has {facts.full(suffix)} = {value!r}, and transformers' "
                           f"{facts.family.model_type} is computed {instead}", facts.where, FIX_ORIGINAL,
                           code="E-CKPT-GGUF-KEY-VALUE")


def _same(value: Any, expected: Any) -> bool:
    """Whether a stored value is the expected one; a file holds floats with 24 bits."""
    if isinstance(value, list):
        return bool(value) and all(_same(one, expected) for one in value)
    if isinstance(expected, float) and isinstance(value, int | float) and not isinstance(value, bool):
        return abs(value - expected) <= 1e-6 * abs(expected)
    return type(value) is type(expected) and bool(value == expected)
