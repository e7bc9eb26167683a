"""What transformers raises while it builds a model from a configuration, as refusals with their cause."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import GqaExportError, UnsupportedModel, cause_of


@contextmanager
def building(config: Any) -> Iterator[None]:
    """Around the call that builds the model of `config`.

    Raises:
        UnsupportedModel: transformers cannot build it: a package is missing, or the configuration contradicts itself.
    """
    try:
        yield
    except (GqaExportError, MemoryError):
        raise
    except ImportError as error:  # a package that parts of it are in (timm)
        raise UnsupportedModel(f"transformers cannot build this model here: {cause_of(error)}",
                               f"model_type {config.model_type}", "install the package that the message names",
                               code="E-MODEL-BUILD-PACKAGE") from error
    except Exception as error:  # a configuration against itself
        fields = _fields_holding(config, error)
        unknown = f"config.json has {fields}, which transformers does not know: " if fields else ""
        raise UnsupportedModel(f"transformers cannot build this model: {unknown}{cause_of(error)}",
                               f"model_type {config.model_type}", "correct config.json, or upgrade transformers",
                               code="E-MODEL-BUILD") from error


def _fields_holding(config: Any, error: Exception) -> str:
    """The fields of a configuration that hold the word which a table of transformers did not have, with the word."""
    word = error.args[0] if isinstance(error, KeyError) and error.args else None
    if not isinstance(word, str):
        return ""
    fields = {**config.to_dict(), **config.get_text_config().to_dict()}
    names = [name for name, value in fields.items() if value == word]
    return f"{' and '.join(names)} {word!r}" if names else ""
