"""Refusals by what a configuration and a module tree show: whatever is not a decoder with grouped attention.

The trace looks deeper (each layer's mask and arguments); what is refused here would not even reach it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import InvalidCheckpoint, UnsupportedModel
from ..spec import FLOATS
from .decoder_layers import layer_lists
from .state_kernels import keeps_states, state_kernels

if TYPE_CHECKING:
    import torch

FIX_DECODER = "gqa-export takes decoder-only models in which every layer is (grouped) softmax attention"
EXTRACT = "pass --text-only to `gqa-export onnx`: then its language model is exported, for text alone"
STATE_PARAMETERS = ("A_log", "dt_bias", "time_decay")
"""names that parameters of recurrent (state-space, delta-rule, RWKV) mixers share across families"""


MOST = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 1 << 14),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim"), 1 << 16),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 1 << 20),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner"), 1 << 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 1 << 16),
    "vocab_size": 1 << 28, "max_position_embeddings": 1 << 31, "n_positions": 1 << 31,
}
"""the most of each that is believed; beyond it, building the model would only fill the memory"""


def refuse_absurd(config: dict[str, Any], where: str) -> None:
    """Raise InvalidCheckpoint for a size that no model has, in config.json or in a section of it (`text_config`)."""
    sections: list[tuple[str, dict[str, Any]]] = [("", config)]
    while sections:
        place, section = sections.pop()
        sections += [(f"{place}{key}.", value) for key, value in section.items() if isinstance(value, dict)]
        for key, most in MOST.items():
            value = section.get(key)
            if isinstance(value, bool | float | str) or (isinstance(value, int) and not 0 <= value <= most):
                raise InvalidCheckpoint(f"config.json has {place}{key} {str(value)[:40]!r}, expected an integer from 0 "
                                        f"to {most}", where, "correct the file, or download it again",
                                        code="E-CKPT-CONFIG-VALUE")


QUANTIZATION = ("quantization_config", "compression_config")
"""keys of config.json under which a quantization is described"""
STORED_AS_CODES = frozenset((
    "aqlm", "auto-round", "awq", "bitsandbytes", "compressed-tensors", "eetq", "fbgemm_fp8", "fp8", "gptq", "higgs",
    "hqq", "modelopt", "mxfp4", "olive", "quanto", "spqr", "torchao", "vptq"))
"""Methods that store codes in place of weights. Plain weights beside such an entry were merged or dequantized, and the
entry was left over. (BitNet is not one of them: it rounds plain weights whenever the model runs.)"""


ALIASES = {"auto_round": "auto-round", "compressed_tensors": "compressed-tensors", "intel/auto-round": "auto-round",
           "modelopt_fp4": "modelopt", "modelopt_mixed": "modelopt"}
"""further names of methods"""
LEFT_OVER = ("{file} describes the weights as quantized ({method}), but all of them are stored as plain numbers: "
             "the entry was left over, and is ignored")
BUFFERS = ("position_ids", "masked_bias", "attn.bias", "attention.bias", "causal_mask")
"""ends of names of tensors that are not weights, and may be whole numbers"""


def without_left_over(config: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """config.json without a quantization that may be left over, and its method, for `refuse_codes`; else ""."""
    method = quantization_method(config)
    if method not in STORED_AS_CODES:
        return config, ""
    return {key: value for key, value in config.items() if key not in QUANTIZATION}, method


def refuse_codes(dtypes: dict[str, str], method: str, where: str) -> None:
    """Refuse weights that are described as quantized unless all of them are plain numbers.

    Args:
        dtypes: type of each tensor by name, as numpy or PyTorch call it.
        method: how they are described.
        where: the checkpoint, for the message.

    Raises:
        UnsupportedModel: one is not a plain number; names the first.
    """
    codes = sorted(name for name, dtype in dtypes.items() if dtype.removeprefix("torch.") not in FLOATS.values()
                   and not name.endswith(BUFFERS))
    if codes:
        refuse_quantized(f"{method}: {codes[0]} is {dtypes[codes[0]]}", where)


def quantization_method(config: dict[str, Any]) -> str:
    """How config.json describes the weights as quantized; "" if it does not."""
    for key in QUANTIZATION:
        if config.get(key):
            entry = config[key] if isinstance(config[key], dict) else {}
            old = any(name.startswith(("load_in_", "bnb_")) for name in entry)  # bitsandbytes before it had a name
            method = str(entry.get("quant_method", "bitsandbytes" if old else key))
            return ALIASES.get(method.lower(), method)
    return ""


def refuse_raw_config(config: dict[str, Any], where: str, text_only: bool = False) -> None:
    """Refuse what config.json alone shows.

    Args:
        config: config.json as a dict.
        where: the checkpoint, for the message.
        text_only: of a multimodal model only the language model is wanted.

    Raises:
        InvalidCheckpoint: a size is absurd.
        UnsupportedModel: the model is quantized, multimodal or an encoder-decoder.
    """
    refuse_absurd(config, where)
    if method := quantization_method(config):
        refuse_quantized(method, where)
    inner = config.get("text_config")
    if isinstance(inner, dict) and not text_only:
        others = sorted(key.removesuffix("_config") for key, value in config.items()
                        if key.endswith("_config") and isinstance(value, dict) and key != "text_config")
        raise UnsupportedModel(f"this is a multimodal wrapper (text and {', '.join(others) or 'more'}), not a plain "
                               "language model", where, EXTRACT, code="E-MODEL-MULTIMODAL")
    if config.get("is_encoder_decoder"):
        raise UnsupportedModel("this is an encoder-decoder: its cross-attention layers are not grouped "
                               "self-attention", where, FIX_DECODER, code="E-MODEL-ENCODER-DECODER")


def refuse_quantized(method: str, where: str) -> NoReturn:
    """Always raises UnsupportedModel: a quantized checkpoint is not exported. method: how it was quantized."""
    raise UnsupportedModel(f"the checkpoint is quantized ({method})", where,
                           "export the original, unquantized checkpoint; quantize the exported model afterwards",
                           code="E-MODEL-QUANTIZED")


def refuse_config(config: Any, where: str, text_only: bool = False) -> None:
    """Refuse what a transformers configuration shows, whose derived fields (`layer_types`) are filled in.

    Args:
        config: a transformers configuration.
        where: the checkpoint, for the message.
        text_only: of a multimodal model only the language model is wanted.

    Raises:
        InvalidCheckpoint: a size is absurd, or there are no layers.
        UnsupportedModel: a layer is not grouped attention, or what `refuse_raw_config` refuses.
    """
    refuse_raw_config(config.to_dict(), where, text_only)
    config = config.get_text_config()
    depth = getattr(config, "num_hidden_layers", None)  # of an encoder, where there are decoder_layers too
    if getattr(config, "decoder_layers", depth) == 0:
        raise InvalidCheckpoint("the model has no layers: with this config.json, transformers builds 0 of them", where,
                                "num_hidden_layers (or what this family calls it) must be at least 1; where each layer "
                                "holds two attentions and it counts those (LongCat-Flash), at least 2",
                                code="E-CKPT-CONFIG-VALUE")
    for layer, kind in enumerate(() if keeps_states(config) else getattr(config, "layer_types", None) or ()):
        if "attention" not in kind or any(word in kind for word in ("linear", "hybrid", "compressed")):
            raise UnsupportedModel(f"layer {layer} is not grouped attention: its type is {kind!r}", where, FIX_DECODER,
                                   code="E-MODEL-LAYER-TYPE")
    if getattr(config, "add_cross_attention", False):
        raise UnsupportedModel("layer 0 has cross-attention to an encoder", where, FIX_DECODER,
                               code="E-MODEL-CROSS-ATTENTION")


def refuse_modules(model: torch.nn.Module, where: str, text_only: bool = False) -> None:
    """Refuse what the module tree shows.

    Args:
        model: the model; its weights are not read, so it may be on the meta device.
        where: the checkpoint, for the message.
        text_only: look at the language model in it only.

    Raises:
        UnsupportedModel: a layer carries a state that transformers' kernel functions do not see, or does not have
            attention.
    """
    import torch

    if text_only:
        model = model.get_decoder()  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)) and max(module.kernel_size) > 1:
            if text_only and not _in_a_layer(model, name):
                continue  # an encoder that text does not pass; the trace refuses a convolution that it does pass
            if _calls_kernels(model, name):
                continue
            _refuse_state(model, name, f"a convolution over {max(module.kernel_size)} tokens", where)
    for name, _ in model.named_parameters():
        if name.rpartition(".")[2] in STATE_PARAMETERS and not _calls_kernels(model, name):
            _refuse_state(model, name, "a recurrent state", where)
    for name, layer in _decoder_layers(model):
        kinds = [type(module).__name__ for module in layer.modules()]
        if not any("attention" in kind.lower() for kind in kinds) and not state_kernels(type(layer).__module__):
            raise UnsupportedModel(f"{_place(name)} does not have attention ({kinds[0]}: {', '.join(kinds[1:4])} ...)",
                                   where, FIX_DECODER, code="E-MODEL-NO-ATTENTION")


def _calls_kernels(model: torch.nn.Module, name: str) -> bool:
    """Whether the module that owns `name` is of a modelling file with kernel functions, in a decoder layer: then the
    trace sees what it does with its state, and refuses what it does not know."""
    owner = type(model.get_submodule(name.rpartition(".")[0]))
    return _in_a_layer(model, name) and bool(state_kernels(owner.__module__))


def state_module(layer: torch.nn.Module) -> str:
    """Why a layer may look at other tokens, by its modules: the class of the first that looks as if; "" if none."""
    import torch

    for module in layer.modules():
        own = [name.rpartition(".")[2] for name, _ in module.named_parameters(recurse=False)]
        if "attention" in type(module).__name__.lower() or any(name in STATE_PARAMETERS for name in own) or isinstance(
                module, (torch.nn.Conv1d, torch.nn.RNNBase)):
            return type(module).__name__
    return ""


def _refuse_state(model: torch.nn.Module, name: str, state: str, where: str) -> None:
    owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
    if not _in_a_layer(model, name):
        raise UnsupportedModel(f"{owner} holds {state} outside of the decoder layers, as encoders of images or sound "
                               "do", f"{where}, module {name}", EXTRACT, code="E-MODEL-ENCODER")
    raise UnsupportedModel(f"{_place(name)} is not grouped attention alone: {owner} carries {state}, which needs a "
                           "cache of its own", f"{where}, module {name}", FIX_DECODER, code="E-MODEL-STATE")


def _in_a_layer(model: torch.nn.Module, name: str) -> bool:
    return any(name.startswith(f"{layer}.") for layer, _ in _decoder_layers(model))


def _place(name: str) -> str:
    number = next((part for part in name.split(".") if part.isdigit()), None)
    return f"layer {number}" if number is not None else f"module {name}"


def _decoder_layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", 0)
    for name, layers in layer_lists(model, depth):
        return [(f"{name}.{number}", layer) for number, layer in enumerate(layers)]
    return []
