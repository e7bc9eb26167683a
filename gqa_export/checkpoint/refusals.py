"""What is no decoder with grouped attention, by what its configuration and module tree show. No list of models.

The trace looks deeper (each layer's mask and arguments); what is refused here would not even reach it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import GqaExportError

if TYPE_CHECKING:
    import torch

FIX_DECODER = "gqa-export takes decoder-only models in which every layer is (grouped) softmax attention"
EXTRACT = "pass --text-only to `gqa-export onnx`: then its language model is exported, for text alone"
STATE_PARAMETERS = ("A_log", "dt_bias", "time_decay")
"""names that parameters of recurrent (state-space, delta-rule, RWKV) mixers share across families"""


MOST = {"num_hidden_layers": 1 << 14, "n_layer": 1 << 14, "num_attention_heads": 1 << 16,
        "num_key_value_heads": 1 << 16, "head_dim": 1 << 16, "hidden_size": 1 << 20, "n_embd": 1 << 20,
        "intermediate_size": 1 << 24,
        "vocab_size": 1 << 28, "max_position_embeddings": 1 << 31, "num_experts": 1 << 16, "num_local_experts": 1 << 16}
"""the most of each that is believed; beyond it, building the model would only fill the memory"""


def refuse_absurd(config: dict[str, Any], where: str) -> None:
    """Sizes that no model has."""
    for key, most in MOST.items():
        value = config.get(key)
        if isinstance(value, bool | float | str) or (isinstance(value, int) and not 0 <= value <= most):
            raise GqaExportError(f"config.json says {key} {str(value)[:40]!r}", where,
                                 "correct the file, or download it again")


def refuse_raw_config(config: dict[str, Any], where: str, text_only: bool = False) -> None:
    """Refusals that config.json alone justifies: absurd sizes, quantized, multimodal, encoder-decoder. text_only:
    of a multimodal model only the language model is wanted."""
    refuse_absurd(config, where)
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            method = config[key].get("quant_method", key) if isinstance(config[key], dict) else key
            refuse_quantized(method, where)
    inner = config.get("text_config")
    if isinstance(inner, dict) and not text_only:
        others = sorted(key.removesuffix("_config") for key, value in config.items()
                        if key.endswith("_config") and isinstance(value, dict) and key != "text_config")
        raise GqaExportError(f"this is a multimodal wrapper (text and {', '.join(others) or 'more'}), not a plain "
                             "language model", where, EXTRACT)
    if config.get("is_encoder_decoder"):
        raise GqaExportError("this is an encoder-decoder: its cross-attention layers are not grouped "
                             "self-attention", where, FIX_DECODER)


def refuse_quantized(method: str, where: str) -> NoReturn:
    """Always raises."""
    raise GqaExportError(f"the checkpoint is quantized ({method})", where,
                         "export the original, unquantized checkpoint; quantize the exported model afterwards")


def refuse_config(config: Any, where: str, text_only: bool = False) -> None:
    """Refusals from a transformers configuration, whose derived fields (`layer_types`) are filled in."""
    refuse_raw_config(config.to_dict(), where, text_only)
    config = config.get_text_config()
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if "attention" not in kind or any(word in kind for word in ("linear", "hybrid", "compressed")):
            raise GqaExportError(f"layer {layer} is not grouped attention: its type is {kind!r}", where, FIX_DECODER)
    if getattr(config, "add_cross_attention", False):
        raise GqaExportError("layer 0 has cross-attention to an encoder", where, FIX_DECODER)


def refuse_modules(model: torch.nn.Module, where: str, text_only: bool = False) -> None:
    """Refusals from the module tree: state beside attention, and decoder layers without any attention. text_only: only
    the language model in it is looked at."""
    import torch

    if text_only:
        model = model.get_decoder()  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)) and max(module.kernel_size) > 1:
            if text_only and not _in_a_layer(model, name):
                continue  # an encoder that text does not pass; the trace refuses a convolution that it does pass
            _refuse_state(model, name, f"a convolution over {max(module.kernel_size)} tokens", where)
    for name, _ in model.named_parameters():
        if name.rpartition(".")[2] in STATE_PARAMETERS:
            _refuse_state(model, name, "a recurrent state", where)
    for name, layer in _decoder_layers(model):
        kinds = [type(module).__name__ for module in layer.modules()]
        if not any("attention" in kind.lower() for kind in kinds):
            raise GqaExportError(f"{_place(name)} has no attention ({kinds[0]}: {', '.join(kinds[1:4])} ...)", where,
                                 FIX_DECODER)


def _refuse_state(model: torch.nn.Module, name: str, what: str, where: str) -> None:
    owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
    if not _in_a_layer(model, name):
        raise GqaExportError(f"{owner} holds {what} outside of the decoder layers, as encoders of images or sound do",
                             f"{where}, module {name}", EXTRACT)
    raise GqaExportError(f"{_place(name)} is not grouped attention alone: {owner} carries {what}, which is a cache of "
                         "its own", f"{where}, module {name}", FIX_DECODER)


def _in_a_layer(model: torch.nn.Module, name: str) -> bool:
    return any(name.startswith(f"{layer}.") for layer, _ in _decoder_layers(model))


def _place(name: str) -> str:
    number = next((part for part in name.split(".") if part.isdigit()), None)
    return f"layer {number}" if number is not None else f"module {name}"


def _decoder_layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    import torch

    depth = getattr(getattr(model, "config", None), "num_hidden_layers", 0)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth > 0:
            return [(f"{name}.{number}", layer) for number, layer in enumerate(module)]
    return []
