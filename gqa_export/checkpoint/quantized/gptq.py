"""GPTQ (AutoGPTQ, GPTQModel, AutoRound's export): codes packed along K, zero points along N, both low bits first.

`checkpoint_format` says whether zero points are stored less one ("gptq", version 1) or as they are ("gptq_v2"), and is
wrong in some checkpoints. So values decide: a symmetric one stores 2 ** (bits - 1) everywhere, or one less; in an
asymmetric one, weights are around zero on average, and a zero point that is off by one moves all of them by a step.
Source: the pack functions of https://github.com/ModelCloud/GPTQModel, `gptqmodel/nn_modules/qlinear`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ...quantized.matrix import QuantizedMatrix
from ...quantized.packed_bits import pack_bits, unpack_bits
from ..refusals import refuse_quantized
from ..safetensors_header import StoredTensor
from .codes import integers
from .description import Description
from .groups import in_groups
from .per_module import settings_of, whole
from .scales import Scales, held_in
from .stored import SCALES, Rows, Stored, floats, stored_array

Array = Any
"""a numpy array"""
BITS = (2, 3, 4, 8)
LAYOUTS = {"": 1, "gptq": 1, "gptq_v2": 0}
"""checkpoint_format -> what its label adds to a stored zero point"""
SAMPLED = 8
"""weights whose mean decides what is added to zero points"""
CENTRED = 0.05
"""the mean of weights, in their standard deviations, that is taken for none. A version is a step, which is 0.3 of them
at 4 bits and groups of 32, and 0.016 at 8: there the mean does not tell"""


class _Module(NamedTuple):
    name: str
    bits: int
    group: int
    codes: StoredTensor
    zeros: StoredTensor
    scale: StoredTensor
    groups: StoredTensor | None


def read_gptq(description: Description, stored: Stored) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Every quantized weight by its name.

    Raises:
        InvalidCheckpoint: a weight lacks a tensor, one does not fit, or zero points contradict the description.
        UnsupportedModel: the layout is another one.
    """
    names = stored.modules(".qweight")
    if not names:
        return
    layout = description.text("checkpoint_format", "format")
    if layout not in LAYOUTS or (layout == "" and description.fields.get("is_marlin_format")):
        refuse_quantized(f"GPTQ, layout {layout or 'marlin'}", stored.where)
    modules = [_taken(description, stored, name) for name in names]
    added = _added(description, stored, modules, LAYOUTS[layout])
    for module in modules:
        yield f"{module.name}.weight", _matrix(stored, module, added[module.name])


def _taken(description: Description, stored: Stored, name: str) -> _Module:
    """The tensors of one weight. Their shapes say how many bits it has, since a description may have exceptions."""
    codes = stored.take(f"{name}.qweight", ("int32",))
    scale = stored.take(f"{name}.scales", SCALES)
    zeros = stored.take(f"{name}.qzeros", ("int32",))
    if len(scale.shape) != 2 or len(codes.shape) != 2 or len(zeros.shape) != 2 or codes.shape[1] != scale.shape[1]:
        raise stored.shape(f"{name}.scales", f"which do not fit a weight packed as {codes.shape}")
    blocks, rows = scale.shape
    bits = next((each for each in BITS if zeros.shape == (blocks, rows * each // 32) and rows * each % 32 == 0), 0)
    settings = settings_of(description, name)
    told = whole(settings, "bits")
    special = description.fields.get("dynamic") or description.fields.get("extra_config")
    if not bits or (bits != told and not special):
        raise stored.shape(f"{name}.qzeros", f"which are not zero points of {told} bits for {rows} rows")
    columns = codes.shape[0] * 32 // bits
    groups = stored.maybe(f"{name}.g_idx", ("int32", "int64"), (columns,))
    group = whole(settings, "group_size") or -1
    group = columns if group < 0 else min(group, columns)
    if special and -(-columns // group) != blocks:
        group = -(-columns // blocks)
    if -(-columns // group) != blocks:
        raise stored.shape(f"{name}.scales", f"which are not scales of groups of {group} of {columns} columns")
    if groups is None and blocks > 1 and settings.get("desc_act"):
        raise stored.missing(f"{name}.g_idx", f"{description.file} has columns in groups by their importance "
                             "(desc_act: true)")
    return _Module(name, bits, group, codes, zeros, scale, groups)


def _matrix(stored: Stored, module: _Module, added: int | None) -> QuantizedMatrix:
    columns, rows = module.codes.shape[0] * 32 // module.bits, module.scale.shape[1]
    scales = Scales(lambda start, stop: np.ascontiguousarray(floats(module.scale, np.s_[:, start:stop]).T),
                    module.group, dtype=held_in(module.scale))
    zeros = None if added is None else _zeros(module, added)
    names = tuple(name for name in (f"{module.name}.{part}" for part in ("qweight", "scales", "qzeros", "g_idx"))
                  if name in stored)
    label = f"GPTQ {module.bits} bits, {'a scale a row' if module.group >= columns else f'group {module.group}'}"
    matrix = integers(lambda start, stop: _codes(module, start, stop, columns), zeros, scales, (rows, columns),
                      module.bits, label if added is None else f"{label}, asymmetric", names)
    return in_groups(stored, f"{module.name}.g_idx", module.groups, matrix)


def _codes(module: _Module, start: int, stop: int, columns: int) -> Array:
    words = np.ascontiguousarray(stored_array(module.codes)[:, start:stop].T)
    return unpack_bits(words.view(np.uint8).reshape(stop - start, -1) if words.size else np.zeros(
        (stop - start, columns), np.uint8), module.bits, columns)


def _stored_zeros(module: _Module, start: int, stop: int) -> Array:
    """Zero points as they are stored, int16 `[rows, blocks]`; 32 of them fill `bits` words."""
    first, last = start // 32, -(-stop // 32)
    part = np.ascontiguousarray(stored_array(module.zeros)[:, first * module.bits : last * module.bits])
    found = unpack_bits(part.view(np.uint8), module.bits, part.shape[1] * 32 // module.bits)
    return found[:, start - first * 32 : stop - first * 32].T.astype(np.int16)


def _zeros(module: _Module, added: int) -> Rows:
    return lambda start, stop: (_stored_zeros(module, start, stop) + added) & ((1 << module.bits) - 1)


def _added(description: Description, stored: Stored, modules: list[_Module], label: int) -> dict[str, int | None]:
    """What is added to the stored zero points of each module by name; None of one that is symmetric."""
    same = {module.name: _only(module) for module in modules}
    told = {module.name: settings_of(description, module.name).get("sym") is True for module in modules}
    versions = set(same.values())
    if len(versions) == 1 and versions <= {0, 1}:
        return dict.fromkeys(same)
    wrong = [name for name in same if told[name] and same[name] < 0]
    sure = {same[name] for name in same if told[name]}
    if wrong or len(sure) > 1:
        raise stored.value(f"{(wrong or list(same))[0]}.qzeros", "or those of another weight do not have the zero "
                           "point of a symmetric quantization, as the description calls it (sym)")
    if sure:  # symmetric weights have the middle, which tells the version of all
        added = sure.pop()
        if added != label:
            stored.notes.append(f"GPTQ's zero points are those of version {2 - added}, whatever checkpoint_format "
                                "says: by those of symmetric weights")
    else:
        added = _by_the_mean(stored, modules, label)
    return {name: None if told[name] else added for name in same}


def _by_the_mean(stored: Stored, modules: list[_Module], label: int) -> int:
    """What is added to zero points, by the mean of weights; the label's where that does not tell."""
    steps = np.concatenate([_steps(module) for module in modules[:SAMPLED]])
    mean, error = float(np.mean(steps)), 3 * float(np.std(steps)) / len(steps) ** .5
    spread = max(_deviation(module) for module in modules[:SAMPLED])
    allowed, other = error + CENTRED * spread, 1 - label
    if allowed < 0.5 and abs(mean - label) <= allowed:
        return label
    if allowed < 0.5 and abs(mean - other) <= allowed:
        stored.notes.append(f"GPTQ's zero points are those of version {2 - other}, whatever checkpoint_format says: by "
                            f"that, weights would be {mean - label:+.2f} steps off on average")
        return other
    stored.notes.append(f"GPTQ's zero points are read as those of version {2 - label}, as checkpoint_format (or its "
                        f"absence) says: the weights' mean, {mean - label:+.2f} steps by that, does not tell")
    return label


def _only(module: _Module) -> int:
    """Which version all zero points of a weight are symmetric in: 1 or 0; -1 if in neither."""
    raw = stored_array(module.zeros).view(np.uint8)
    for added in (1, 0):
        code = np.full((1, module.scale.shape[1]), (1 << module.bits - 1) - added, np.uint8)
        if np.all(raw == pack_bits(code, module.bits)):
            return added
    return -1


def _steps(module: _Module) -> Array:
    """Code minus stored zero point, the mean of each of some rows: about what has to be added to zero points."""
    return np.mean(_differences(module), axis=1)


def _deviation(module: _Module) -> float:
    """The standard deviation of weights in steps."""
    return float(np.std(_differences(module)))


def _differences(module: _Module) -> Array:
    """Code minus stored zero point of some rows, `[rows, K]`."""
    rows = min(64, module.scale.shape[1])
    columns = module.codes.shape[0] * 32 // module.bits
    codes, zeros = _codes(module, 0, rows, columns), _stored_zeros(module, 0, rows)
    groups = np.arange(columns) // module.group if module.groups is None else stored_array(module.groups)
    return codes - zeros[:, np.clip(groups, 0, zeros.shape[1] - 1)].astype(np.float64)
