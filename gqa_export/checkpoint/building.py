"""What transformers raises while it builds a model from a configuration, as refusals with their cause."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import GqaExportError, UnsupportedModel, cause_of


@contextmanager
def without_absent_parts(config: Any) -> Iterator[None]:
    """Inside, a part beside the text model of `config` (an encoder of images or sound) whose package is not installed
    is built as a module without parameters. Text does not pass it: whatever calls it is told so."""
    from transformers import AutoModel

    text = config.get_text_config(decoder=True)
    auto: Any = AutoModel
    there, inherited = "from_config" in vars(auto), auto.from_config

    def from_config(part: Any, *arguments: Any, **others: Any) -> Any:
        try:
            return inherited(part, *arguments, **others)
        except ImportError as error:
            if part is config or type(part) is type(text):
                raise
            return _absent(f"{type(part).__name__}: {cause_of(error)}")

    auto.from_config = from_config
    try:
        yield
    finally:
        if there:
            auto.from_config = inherited
        else:
            del auto.from_config


def _absent(reason: str) -> Any:
    """A module in the place of one that cannot be built; it refuses to run."""
    import torch

    class Absent(torch.nn.Module):
        """Not built: a package is missing."""

        not_built = reason

        def forward(self, *_: Any, **__: Any) -> Any:
            """Always raises UnsupportedModel."""
            raise UnsupportedModel(f"a part of the model that cannot be built here is called: {reason}", "the model",
                                   "install the package that the message names", code="E-MODEL-BUILD-PACKAGE")

    return Absent()


def absent_parts(model: Any) -> dict[str, str]:
    """Names of the modules that `without_absent_parts` left out of a model, with the reason."""
    return {name: module.not_built for name, module in model.named_modules() if hasattr(module, "not_built")}


@contextmanager
def building(config: Any) -> Iterator[None]:
    """Around the call that builds the model of `config`; what `without_absent_parts` leaves out is left out.

    Raises:
        UnsupportedModel: transformers cannot build it: a package is missing, or the configuration contradicts itself.
    """
    try:
        with without_absent_parts(config):
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
