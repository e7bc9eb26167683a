"""What an export imports for nothing, and what stands in its place: the one table.

PyTorch's tracing and transformers' modelling code import a compiler, distributed tensors, training helpers and the
sources of every model, of which an export or a validation uses nothing. The `gqa-export` program, whose process is its
own, puts the rows of this table in force before it imports either; a program that imports `gqa_export` is left as it
is. A module that stands aside is run, in its own place, by whoever first uses something of it (see `deferred_module`),
so a row saves time or does nothing. GQA_EXPORT_STAND_INS=off imports everything as ever. The seconds are of
`python -X importtime` on two idle cores; those of changes, of the hub's interface and of PyTorch's quantization are of
the process's clock, the least of several runs with and without the row. `scripts/stand_in_seconds.py` measures whole
exports with and without a row. 0 is a row without which another, named in `until`, saves nothing.
"""

from __future__ import annotations

import types
from collections.abc import Callable

from .deferred_imports import install
from .deferred_module import run
from .stand_in_rows import DISABLED, LATER, NATIVE, REPLAYED, Change, Row, StandIn
from .torch_changes import ask_frames_first, make_gradients_later, materialize_once, name_callers_alone
from .transformers_names import read_names_later

TORCH, TRANSFORMERS, ACCELERATE, ONNXSCRIPT, HUB = ("2.13",), ("5.24",), ("1.15",), ("0.7",), ("2.4",)
"""versions that the rows were measured with"""
TENSOR = "torch.distributed.tensor"
INDUCTOR = "torch._inductor"


def later(*names: str) -> dict[str, str]:
    """Classes and functions that are looked up when they are used."""
    return dict.fromkeys(names, LATER)


def _validation_off(module: types.ModuleType) -> Callable[[], bool]:
    """The stand-in of a question that is answered by a setting alone while that is off."""

    def translation_validation_enabled() -> bool:
        from torch.fx.experimental import _config as config

        if not config.translation_validation:
            return False
        run(module)
        return bool(module.translation_validation_enabled())

    return translation_validation_enabled


TORCHLIB = Change("onnxscript._internal.values", "onnxscript", ONNXSCRIPT, 0.28,
                  "torchlib parses its functions when they are used", symbol="OnnxFunction, TracedOnnxFunction")
"""made by `trace.capture.torchlib`, around the call that reads the library"""
CONVERSIONS = Change("transformers.conversion_mapping", "transformers", TRANSFORMERS, 0.05,
                     "transformers builds the conversions of one model", symbol="_build_checkpoint_conversion_mapping")
"""made by `trace.skeleton.converts`, which asks what the table can have entries for"""

TABLE: tuple[Row, ...] = (
    StandIn("torch._dynamo", "torch", TORCH, 0.62, "make_fx and transformers.masking_utils do not import it",
            {"allow_in_graph": REPLAYED, "assume_constant_result": REPLAYED, "disable": DISABLED,
             **later("OptimizedModule")}, ("torch._compile", "torch.fx.experimental.proxy_tensor"),
            free=("torch._dynamo.config", "torch._dynamo.source", "torch._dynamo.utils"), reads_code=True),
    StandIn("torch._dynamo.utils", "torch", TORCH, 0, "with torch._dynamo"),
    StandIn("torch._dynamo.bytecode_transformation", "torch", TORCH, 0, "with torch._dynamo",
            later("create_binary_subscr", "create_build_tuple", "create_call_function"), ("torch._dynamo.source",)),
    StandIn("torch._dynamo._trace_wrapped_higher_order_op", "torch", TORCH, 0, "with torch._dynamo",
            later("TransformGetItemToIndex"), ("transformers.masking_utils",)),
    StandIn(INDUCTOR, "torch", TORCH, 0, "with torch._dynamo",
            free=(f"{INDUCTOR}.config", f"{INDUCTOR}.custom_graph_pass", f"{INDUCTOR}.compiler_bisector",
                  f"{INDUCTOR}.runtime", f"{INDUCTOR}.runtime.cache_dir_utils", f"{INDUCTOR}.fx_passes",
                  f"{INDUCTOR}.fx_passes.dedupe_symint_uses")),
    StandIn("torch.fx.experimental.validator", "torch", TORCH, 0, "with torch._dynamo",
            {"translation_validation_enabled": _validation_off}, ("torch.fx.experimental.symbolic_shapes",)),
    StandIn("transformers.generation.continuous_batching.cache", "transformers", TRANSFORMERS, 0,
            "with torch._dynamo", later("PagedAttentionCache", "ATTN_TYPE_TO_ALLOCATOR", "group_layers_by_attn_type"),
            ("transformers.",)),
    StandIn("transformers.integrations.flex_attention", "transformers", TRANSFORMERS, 0, "with torch._dynamo",
            later("flex_attention_forward", "compile_friendly_flex_attention"), ("transformers.",)),
    StandIn(TENSOR, "torch", TORCH, 0.21, "transformers does not import it where nothing is distributed",
            {**later("DTensor", "distribute_tensor"),
             **dict.fromkeys(("Partial", "Replicate", "Shard"), f"{TENSOR}.placement_types")},
            ("transformers.", NATIVE),
            free=(f"{TENSOR}.placement_types", f"{TENSOR}._dtensor_spec", f"{TENSOR}._collective_utils"),
            first=f"{TENSOR}._dtensor_spec"),
    StandIn(f"{TENSOR}._ops", "torch", TORCH, 0, f"with {TENSOR}", free=(f"{TENSOR}._ops._mask_buffer",)),
    StandIn(f"{TENSOR}._utils", "torch", TORCH, 0, f"with {TENSOR}",
            later("compute_local_shape_and_global_offset"), ("transformers.",)),
    StandIn("torch.distributed._composable.fsdp", "torch", TORCH, 0.1, f"with {TENSOR}", later("fully_shard"),
            ("transformers.",)),
    StandIn("torch.distributed.fsdp", "torch", TORCH, 0, f"with {TENSOR}",
            later("CPUOffloadPolicy", "MixedPrecisionPolicy"), ("transformers.",)),
    StandIn("torch.distributed.checkpoint", "torch", TORCH, 0, f"with {TENSOR}"),
    StandIn("torch.distributed.checkpoint.hf_storage", "torch", TORCH, 0.07, f"with {TENSOR}",
            later("HuggingFaceStorageReader", "HuggingFaceStorageWriter"), ("transformers.",)),
    StandIn("accelerate", "accelerate", ACCELERATE, 0.09, "transformers imports it where it dispatches a model",
            later("dispatch_model", "PartialState"), ("transformers.",)),
    StandIn("accelerate.utils", "accelerate", ACCELERATE, 0, "with accelerate",
            later("get_max_memory", "extract_model_from_parallel", "get_balanced_memory", "infer_auto_device_map",
                  "reduce"), ("transformers.",)),
    StandIn("accelerate.utils.modeling", "accelerate", ACCELERATE, 0, "with accelerate",
            later("clean_device_map", "get_max_layer_size"), ("transformers.",)),
    StandIn("accelerate.hooks", "accelerate", ACCELERATE, 0, "with accelerate",
            later("AlignDevicesHook", "add_hook_to_module"), ("transformers.",)),
    StandIn("huggingface_hub.hf_api", "huggingface_hub", HUB, 0.05, "transformers.utils.hub does not import it",
            later("HfApi", "RepoFile", "upload_file"), ("huggingface_hub.", NATIVE)),
    StandIn("transformers.safetensors_conversion", "transformers", TRANSFORMERS, 0, "with huggingface_hub.hf_api",
            later("auto_conversion"), ("transformers.",)),
    StandIn("torch.distributions", "torch", TORCH, 0.02, "torch imports it when it is used",
            importers=("transformers.",), free=("torch.distributions.constraints",)),
    StandIn("torch.quantization", "torch", TORCH, 0.02, "torch imports it when it is used"),
    *(StandIn(f"torch.nn.{name}", "torch", TORCH, 0, "with torch.quantization")
      for name in ("intrinsic", "qat", "quantizable", "quantized")),
    Change("transformers.utils.import_utils", "transformers", TRANSFORMERS, 0.44,
           "transformers keeps its table of names, or makes it once", symbol="define_import_structure",
           change=read_names_later),
    Change("torch._library.utils", "torch", TORCH, 0.11, "get_source does not read the caller's file",
           symbol="get_source", change=name_callers_alone),
    Change("torch.library", "torch", TORCH, 0, "with torch._library.utils", symbol="inspect",
           change=ask_frames_first),
    Change("torch._library.autograd", "torch", TORCH, 0.12, "an operator's autograd function is made when it is used",
           symbol="make_autograd_impl", change=make_gradients_later),
    Change("torch._export.utils", "torch", TORCH, 0.07, "operators of C++ are looked up once",
           symbol="_materialize_cpp_cia_ops", change=materialize_once),
    TORCHLIB,
    CONVERSIONS,
)


def stand_in() -> Callable[[], None]:
    """Put the table in force in this process; returns what ends it."""
    return install(TABLE)
