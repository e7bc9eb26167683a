"""A checkpoint -> the configuration as transformers understands it, or a refusal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import GqaExportError, first_line
from .checkpoint import Checkpoint
from .quiet import quiet
from .refusals import FIX_DECODER, refuse_config

if TYPE_CHECKING:
    import transformers


def load_config(checkpoint: Checkpoint, **overrides: Any) -> transformers.PretrainedConfig:
    """The configuration with `overrides` set. Lists with one value a layer follow `num_hidden_layers`.

    Raises GqaExportError for an architecture that transformers does not know as a causal language model, and for
    what `refuse_config` refuses. KeyError for an override that the configuration does not have.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = checkpoint.config.get("model_type")
    if model_type not in CONFIG_MAPPING_NAMES:
        remote = ", and code that comes with a checkpoint is not run" if checkpoint.config.get("auto_map") else ""
        raise GqaExportError(f"unknown architecture: transformers has no model_type {model_type!r}{remote}",
                             checkpoint.source, "upgrade transformers, or correct model_type in config.json")
    try:
        with quiet():
            config = AutoConfig.for_model(**checkpoint.config) if checkpoint.kind == "gguf" else \
                AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a damaged config.json makes transformers raise
        raise GqaExportError(f"transformers cannot read config.json: {first_line(error)}", checkpoint.source,
                             "correct the file, or download it again") from error
    _check_architecture(config, checkpoint.source)
    refuse_config(config, checkpoint.source, checkpoint.text_only)
    return _override(config, overrides)


def _check_architecture(config: transformers.PretrainedConfig, where: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    known = {name for value in CAUSAL.values() for name in ([value] if isinstance(value, str) else value)}
    named = list(config.architectures or [])
    if named and not known.intersection(named):
        raise GqaExportError(f"{named[0]} is not a causal language model with a head", where, FIX_DECODER)
    if config.model_type not in CAUSAL:
        raise GqaExportError(f"transformers has no causal language model of type {config.model_type!r}", where,
                             FIX_DECODER)


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
