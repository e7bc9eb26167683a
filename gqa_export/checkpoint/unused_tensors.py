"""Tensors of a checkpoint that its model does not use: refused by name, unless they are of a kind that carries nothing.

transformers drops such tensors without a word, and so does every comparison with it: a `q_proj.bias` beside
`attention_bias: false` would be lost and the export would pass. Names alone decide, so nothing is loaded; they are
renamed and merged by transformers' own rules (`rename_source_key`, as `from_pretrained` calls it).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import InvalidCheckpoint
from .building import absent_parts, building
from .checkpoint import Checkpoint
from .load_config import load_config
from .load_model import load_skeleton, some
from .pickle_weights import read_pickles
from .quiet import quiet

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


def _square(shape: Shape) -> bool:
    return len(shape) in (2, 4) and shape[-1] == shape[-2] and set(shape[:-2]) <= {1}


KINDS: tuple[tuple[str, re.Pattern[str], Callable[[Shape], bool]], ...] = (
    ("rotary frequencies", re.compile(r"(^|\.)rotary_emb\w*\.(original_)?inv_freq$|(^|\.)attention\.inv_freq$"),
     lambda shape: len(shape) == 1),
    ("causal masks", re.compile(r"(^|\.)(attn|attention)\.bias$|(^|\.)(causal_mask|attn_mask)$"), _square),
    ("values of masked scores", re.compile(r"(^|\.)masked_bias$"), lambda shape: set(shape) <= {1}),
)
"""kind, the names and the shapes of it: buffers that older releases of transformers stored and today's compute"""


def unused_notes(checkpoint: Checkpoint, used: Collection[str], ignore: bool = False) -> tuple[str, ...]:
    """What a checkpoint stores and its model does not use, as notes for the user.

    Args:
        checkpoint: an opened checkpoint. A GGUF file and a model in memory have nothing to look at: the first has
            its own reader, the second is held against its configuration when it is opened.
        used: names that are known to be used. The model's structure is looked at only if there are others.
        ignore: note tensors that would be refused.

    Raises:
        InvalidCheckpoint: tensors are not used, not of a harmless kind, and not to be ignored.
    """
    stored: dict[str, Shape] = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    if checkpoint.gguf_file is None:
        stored.update({name: matrix.parameter_shape for name, matrix in checkpoint.quantized.items()})
    if checkpoint.pickles:
        stored = {name: tuple(tensor.shape) for name, tensor in read_pickles(checkpoint.pickles).items()}
    if stored.keys() <= set(used):
        return ()
    skeleton = load_skeleton(checkpoint)
    models = [skeleton]
    unused = _unused(skeleton, stored)
    if unused and checkpoint.text_only and (whole := _whole_model(checkpoint, skeleton)) is not None:
        models.append(whole)
        elsewhere = _unused(whole, stored)
        unused = {name: read for name, read in unused.items() if name in elsewhere}
    harmless, unexpected = _sorted_out(models, unused, stored)
    if unexpected and not ignore:
        raise InvalidCheckpoint(
            f"the checkpoint has tensors that the model does not use: {some(unexpected)}", checkpoint.source,
            "correct config.json (attention_bias, mlp_bias, num_hidden_layers and others decide which tensors a model "
            "has), or pass --ignore-unused (ignore_unused=True) to export without them",
            code="E-CKPT-TENSORS-UNUSED")
    notes = [f"not used, {kind}: {_patterns(names)}" for kind, names in harmless.items()]
    if unexpected:
        notes.append(f"not used, ignored as --ignore-unused wants: {_patterns(unexpected)}")
    return tuple(notes)


def _unused(model: torch.nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The names that transformers does not load into this model, with what it reads them as. Of two names that it
    reads as one tensor, the second."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    prefix, state = str(model.base_model_prefix), model.state_dict()
    taken: set[str] = set()
    unused = {}
    for name in sorted(names, key=lambda name: (name not in state, name)):
        renamed, merged = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, merged = rename_source_key(name, [], [], prefix, state)
        if renamed not in state or (merged is None and renamed in taken):
            unused[name] = renamed
        elif merged is None:
            taken.add(renamed)
    return unused


def _whole_model(checkpoint: Checkpoint, skeleton: torch.nn.Module) -> torch.nn.Module | None:
    """The multimodal model that the checkpoint is of, without weights; None if it is the skeleton's own class."""
    import torch
    import transformers

    named = [name for name in checkpoint.config.get("architectures") or [] if name != type(skeleton).__name__]
    found: Any = next((made for name in named if (made := getattr(transformers, str(name), None))), None)
    if not hasattr(found, "_from_config"):
        return None
    config = load_config(checkpoint)
    with quiet(), torch.device("meta"), building(config):
        model: torch.nn.Module = found._from_config(config)
    return model


def _sorted_out(models: Iterable[Any], unused: Mapping[str, str],
                shapes: Mapping[str, Shape]) -> tuple[dict[str, list[str]], list[str]]:
    """Names of harmless tensors by kind, and the others."""
    listed: set[str] = set()
    absent: tuple[str, ...] = ()
    for model in models:
        absent += tuple(f"{name}." for name in absent_parts(model))
        listed.update(model._keys_to_ignore_on_load_unexpected or ())
        if any(name.endswith("position_ids") for name, _ in model.named_buffers()):
            listed.add(r"(^|\.)position_ids$")
    kinds: dict[str, list[str]] = {}
    others = []
    for name, read in unused.items():
        kind = next((kind for kind, names, fits in KINDS if names.search(name) and fits(shapes[name])), "")
        if not kind and any(re.search(pattern, read) for pattern in listed):
            kind = "which transformers leaves out of this model"
        if not kind and read.startswith(absent):
            kind = "of a part of the model that is not built here and that text does not pass"
        if kind:
            kinds.setdefault(kind, []).append(name)
        else:
            others.append(name)
    return kinds, others


def _patterns(names: Iterable[str]) -> str:
    """Names with their numbers as `*`, each pattern once with how many it stands for."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for name in names:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        counts[pattern] += 1
        first.setdefault(pattern, name)
    return ", ".join(first[pattern] if count == 1 else f"{pattern} ({count})" for pattern, count in counts.items())
