"""Fields of a description that no reader reads: those that change what the model computes are refused, a quantized
cache is noted, and so is a field that is not known. Fields without a value (null, false, nothing) say nothing.

Source: `transform/transform_args.py` of https://github.com/vllm-project/compressed-tensors for which transforms are
applied as a model runs; the configuration classes of transformers (`utils/quantization_config.py`), GPTQModel
(`quantization/config.py`), ModelOpt (`export/quant_utils.py`) and AutoRound for the fields.
"""

from __future__ import annotations

import re
from typing import Any

from ..refusals import refuse_quantized
from .description import Description

OFFLINE = ("weight_input", "weight_output")
"""places of a transform of which the stored weights are the result; those of all others are in the computation"""
TRANSFORMS = re.compile(r"transform_config|rotat|hadamard|quarot|spinquant")
CACHES = ("kv_cache_scheme", "kv_cache_quant_algo")
EVERY = frozenset((
    "quant_method", "modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules", "lm_head", "producer",
    "version", "meta", "dtype", "torch_dtype", "model_name_or_path", "model_file_base_name", "bits", "group_size",
    "sym", "symmetric", "tied_weights", *CACHES))
OF_GPTQ = frozenset((
    "checkpoint_format", "format", "desc_act", "dynamic", "damp_percent", "damp_auto_increment", "static_groups",
    "true_sequential", "is_marlin_format", "pack_dtype", "block_name_to_quantize", "module_name_preceding_first_block",
    "modules_in_block_to_quantize", "tokenizer", "dataset", "batch_size", "pad_token_id", "use_cuda_fp16",
    "use_exllama", "exllama_config", "disable_exllama", "max_input_length", "cache_block_outputs", "model_seqlen",
    "backend", "hyb_act", "mse", "act_group_aware", "rotation", "offload_to_disk", "quant_path",
    "cache_examples_on_gpu", "uri", "quantizer", "gptaq", "failsafe", "fallback", "method"))
OF_AWQ = frozenset((
    "w_bit", "q_group_size", "zero_point", "packing_format", "checkpoint_format", "format", "backend", "do_fuse",
    "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "pack_dtype", "method", "desc_act", "dynamic"))
OF_AUTO_ROUND = OF_GPTQ | OF_AWQ | {
    "data_type", "autoround_version", "auto_round_version", "extra_config", "iters", "lr", "minmax_lr", "nsamples",
    "seqlen", "enable_quanted_input", "enable_minmax_tuning", "scale_dtype", "amp", "gradient_accumulate_steps",
    "low_gpu_mem_usage", "to_quant_block_names", "quant_block_list", "enable_norm_bias_tuning",
    "super_bits", "super_group_size", "act_bits", "act_group_size", "act_sym", "act_dynamic", "act_data_type",
    "supported_types", "quant_lm_head", "layer_config", "sdtype", "nblocks", "enable_alg_ext", "enable_torch_compile",
    "not_use_best_mse", "use_quant_input", "momentum", "disable_opt_rtn", "regex_config", "fp_layers"}
KNOWN: dict[str, frozenset[str]] = {
    "auto-round": frozenset(OF_AUTO_ROUND),
    "awq": OF_AWQ,
    "bitsandbytes": frozenset(("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "llm_int8_threshold",
                               "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight",
                               "bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
                               "bnb_4bit_quant_storage", "bnb_4bit_blocksize", "target_parameters")),
    "compressed-tensors": frozenset(("config_groups", "format", "quantization_status", "global_compression_ratio",
                                     "sparsity_config", "quantization_config", "run_compressed", "dequantize")),
    "fbgemm_fp8": frozenset(("activation_scale_ub",)),
    "fp8": frozenset(("fmt", "scale_fmt", "activation_scheme", "weight_block_size", "weight_per_tensor", "dequantize",
                      "act_per_tensor", "weight_scale_fmt", "modules_to_convert", "weight_scale_dtype")),
    "gptq": OF_GPTQ,
    "hqq": frozenset(("quant_config", "skip_modules", "weight_quant_params", "scale_quant_params", "zero_quant_params",
                      "offload_meta", "nbits", "axis", "view_as_float", "dynamic_config")),
    "modelopt": frozenset(("quant_algo", "quantized_layers", "config_groups", "has_zero_point", "pre_quant_scale",
                           "smoothquant_val", "quantization", "activation_scheme", "targets")),
    "mxfp4": frozenset(("dequantize",)),
    "olive": frozenset(("overrides", "embeds", "tie_word_embeddings")),
    "torchao": frozenset(("quant_type", "quant_type_kwargs", "include_input_output_embeddings",
                          "untie_embedding_weights", "include_embedding", "untie_embedding")),
}
"""method -> fields that are read, or that do not change what the model computes with its stored weights"""


def refuse_transforms(description: Description, where: str) -> None:
    """Refuse a model that transforms what goes through its layers as it runs. Its weights alone are another model.

    Raises:
        UnsupportedModel: names the field and the place.
    """
    for name, value in description.fields.items():
        if not value or not TRANSFORMS.search(name.lower()) or (description.method, name) == ("gptq", "rotation"):
            continue
        places = [place for place in _places(value) if place not in OFFLINE] if name == "transform_config" else [""]
        if places:
            place = f" at {places[0]}" if places[0] else ""
            refuse_quantized(f"{description.method} with {name}{place}: what goes through its layers is transformed as "
                             "the model runs", where)


def _places(config: Any) -> list[str]:
    """Where each transform of compressed-tensors is applied; "an unknown place" of one that is not described so."""
    groups = config.get("config_groups") if isinstance(config, dict) else None
    if not isinstance(groups, dict):
        return [] if isinstance(config, dict) and not any(config.values()) else ["an unknown place"]
    found = []
    for group in groups.values():
        applied = group.get("apply") if isinstance(group, dict) else None
        for each in applied if isinstance(applied, list) else [None]:
            found.append(str(each.get("location")).lower() if isinstance(each, dict) else "an unknown place")
    return found


def notes_of(description: Description) -> list[str]:
    """What a user must know of fields that are not followed."""
    fields = {name: value for name, value in description.fields.items() if value or value is True}
    notes = [f"the description has a quantized cache ({name}), which this export does not: --kv-cache quantizes it"
             for name in CACHES if name in fields and str(fields[name]).lower() != "none"]
    if description.method == "gptq" and "rotation" in fields:
        notes.append(f"the weights were rotated before they were quantized (rotation: {fields['rotation']}), and are "
                     "read as they are stored: GPTQModel has all of a rotation in the weights")
    groups = fields.get("config_groups")
    if any(isinstance(group, dict) and group.get("output_activations") for group in (
            groups.values() if isinstance(groups, dict) else ())):
        notes.append("the description has outputs of layers quantized (output_activations), which this export does not")
    known = EVERY | KNOWN[description.method]
    unknown = sorted(name for name in fields if name not in known and not TRANSFORMS.search(name.lower()))
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        notes.append(f"fields of {description.file} that are not known here, and not used: "
                     f"{', '.join(unknown[:5])}{more}")
    return notes
