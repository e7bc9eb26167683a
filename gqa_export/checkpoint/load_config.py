"""A checkpoint -> the configuration as transformers understands it, or a refusal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InvalidCheckpoint, UnsupportedModel, cause_of
from .checkpoint import Checkpoint
from .quiet import quiet
from .refusals import FIX_DECODER, QUANTIZATION, refuse_config

if TYPE_CHECKING:
    import transformers


def load_config(checkpoint: Checkpoint, **overrides: Any) -> transformers.PretrainedConfig:
    """The configuration of a checkpoint, as transformers understands it.

    Args:
        checkpoint: an opened checkpoint.
        **overrides: fields to set. Lists with one value per layer are cut to a smaller `num_hidden_layers`.

    Raises:
        InvalidCheckpoint: transformers cannot read the configuration, or a size in it is absurd.
        UnsupportedModel: transformers does not know the architecture as a causal language model, or `refuse_config`
            refuses it.
        KeyError: an override names a field that the configuration does not have.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]

    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING_NAMES:
        remote = ", and code that comes with a checkpoint is not run" if checkpoint.config.get("auto_map") else ""
        raise UnsupportedModel(f"the installed transformers does not know the model_type {model_type!r}{remote}",
                               checkpoint.source, "upgrade transformers, or correct model_type in config.json",
                               code="E-MODEL-UNKNOWN")
    try:
        with quiet():
            config = AutoConfig.for_model(**checkpoint.config) if checkpoint.kind == "gguf" else \
                AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a damaged config.json makes transformers raise
        raise InvalidCheckpoint(f"transformers cannot read the configuration: {cause_of(error)}", checkpoint.source,
                                "correct the file, or download it again", code="E-CKPT-CONFIG") from error
    for key in QUANTIZATION:
        if hasattr(config, key) and key not in checkpoint.config:
            delattr(config, key)  # left over, as `open_checkpoint` found
    _check_architecture(config, checkpoint.source)
    refuse_config(config, checkpoint.source, checkpoint.text_only)
    return _override(config, overrides)


def _check_architecture(config: transformers.PretrainedConfig, where: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    known = {name for value in CAUSAL.values() for name in ([value] if isinstance(value, str) else value)}
    named = list(config.architectures or [])
    if named and not known.intersection(named):
        raise UnsupportedModel(f"{named[0]} is not a causal language model with a head", where, FIX_DECODER,
                               code="E-MODEL-NOT-CAUSAL")
    if config.model_type not in CAUSAL:
        raise UnsupportedModel(f"transformers does not have a causal language model of the type {config.model_type!r}",
                               where, FIX_DECODER, code="E-MODEL-NOT-CAUSAL")


def _override(config: transformers.PretrainedConfig, overrides: dict[str, Any]) -> transformers.PretrainedConfig:
    depth, wanted = getattr(config, "num_hidden_layers", None), overrides.get("num_hidden_layers")
    for name, value in overrides.items():
        if not hasattr(config, name):
            raise KeyError(f"the configuration {type(config).__name__} has no {name!r}")
        setattr(config, name, value)
    if depth and wanted and wanted < depth:
        for name, value in list(vars(config).items()):
            if isinstance(value, (list, tuple)) and len(value) == depth and name not in overrides:
                setattr(config, name, value[:wanted])
    return config
