"""`genai_config.json`: what onnxruntime-genai needs to know to run an `ort` bundle as it is.

Keys as its model builder writes them (onnxruntime_genai/models/builders/base.py, 0.18). The model type is "decoder",
the name it has for any decoder with these inputs; most families' own names it does not know. It finds the states of
fixed size by the names of their inputs, but where all are convolutions' only under the type CONVOLUTIONS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..bundle.manifest import MODEL, Manifest
from ..errors import UnsupportedModel
from ..graph_io import ATTENTION_MASK, INPUT_IDS, LOGITS, past_names, past_state, present_names, present_state
from ..spec import AttentionSpec, ModelSpec, StateSpec
from ..targets import get_target

FILE = "genai_config.json"
CONVOLUTIONS = "lfm2"
"""onnxruntime-genai's type of decoders whose layers keep either keys and values or the inputs of a convolution"""


def misfit(manifest: Manifest) -> str:
    """Why onnxruntime-genai cannot hold this model, or "": it knows one shape of cache for all layers."""
    layers, states = manifest.spec.layers, manifest.spec.states
    if manifest.kv_cache is not None:
        return "its cache is quantized, which was not run with onnxruntime-genai"
    if not layers:
        return "no layer owns a cache"
    if not states and [layer.layer for layer in layers] != list(range(len(layers))):
        return "some layers own no cache"
    if len(manifest.spec.owners) < len(layers):
        return "some layers read the caches of others, which was not run with onnxruntime-genai"
    if any(state.index for state in states):
        return "a layer keeps several states of one kind"
    keeping = [layer.layer for layer in layers] + [state.layer for state in states]
    if convolutions_alone(manifest.spec) and sorted(keeping) != list(range(manifest.spec.depth)):
        return "layers keep something else than keys and values or the inputs of a convolution"
    if len({_cache_shape(layer) for layer in layers}) > 1:
        return "layers differ in key/value heads or head size"
    if layers[0].head_size != layers[0].value_head_size:
        return "head sizes of keys and values differ"
    return ""


def _cache_shape(layer: AttentionSpec) -> tuple[int, int, int]:
    return layer.kv_num_heads, layer.head_size, layer.value_head_size


def genai_config(manifest: Manifest, provider: str = "cpu") -> dict[str, Any]:
    """The content of genai_config.json: greedy search up to the bundle's capacity, every end token honoured.

    Args:
        manifest: of an `ort` bundle.
        provider: "cpu" or "cuda".

    Raises:
        UnsupportedModel: onnxruntime-genai cannot hold the model; see `misfit`.
    """
    reason = misfit(manifest)
    if reason:
        raise UnsupportedModel(f"onnxruntime-genai cannot hold this model: {reason}", FILE,
                               "run the bundle with gqa-export run or with ONNX Runtime itself",
                               code="E-MODEL-GENAI")
    layer, spec = manifest.spec.layers[0], manifest.spec
    eos = list(manifest.tokens.get("eos") or [])
    tokens = {"bos_token_id": manifest.tokens.get("bos"), "pad_token_id": manifest.tokens.get("pad")}
    if tokens["pad_token_id"] is None and eos:
        tokens["pad_token_id"] = eos[0]
    past_key, past_value = _patterns(past_names)
    present_key, present_value = _patterns(present_names)
    return {
        "model": {
            **{name: token for name, token in tokens.items() if token is not None},
            "eos_token_id": eos,
            "context_length": manifest.capacity,
            "type": CONVOLUTIONS if convolutions_alone(spec) else "decoder",
            "vocab_size": spec.vocabulary,
            "decoder": {
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "provider_options": [] if provider == "cpu" else [{provider: {}}],
                },
                "filename": MODEL,
                "head_size": layer.head_size,
                "hidden_size": spec.hidden_size,
                "num_attention_heads": layer.num_heads,
                "num_hidden_layers": spec.depth,
                **({"layer_types": layer_types(spec)} if convolutions_alone(spec) else {}),
                "num_key_value_heads": layer.kv_num_heads,
                "inputs": {
                    "input_ids": INPUT_IDS,
                    "attention_mask": ATTENTION_MASK,
                    "past_key_names": past_key,
                    "past_value_names": past_value,
                    **_state_patterns(spec, "past", past_state),
                },
                "outputs": {
                    "logits": LOGITS,
                    "present_key_names": present_key,
                    "present_value_names": present_value,
                    **_state_patterns(spec, "present", present_state),
                },
            },
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": manifest.capacity,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": get_target(manifest.target).writes_in_place(manifest.fallbacks),
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }


def convolutions_alone(spec: ModelSpec) -> bool:
    """Whether all states of a decoder are inputs of convolutions."""
    return bool(spec.states) and not spec.states_of("recurrent")


def layer_types(spec: ModelSpec) -> list[str]:
    """Of each layer, what it keeps, in the words of onnxruntime-genai."""
    attention = {layer.layer for layer in spec.layers}
    return ["full_attention" if layer in attention else "conv" for layer in range(spec.depth)]


def _state_patterns(spec: ModelSpec, side: str, name: Callable[[StateSpec], str]) -> dict[str, str]:
    """The names of the states, with %d for the layer's number."""
    return {f"{side}_{state.kind}_names": name(replace(state, layer=987654)).replace("987654", "%d")
            for state in spec.states}


def _patterns(names: Any) -> tuple[str, str]:
    """Key and value names with %d for the layer's number."""
    # a number that stands nowhere else in the names
    key, value = (name.replace("987654", "%d") for name in names(987654))
    return key, value
