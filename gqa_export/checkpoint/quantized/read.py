"""A folder's stored tensors -> quantized weights and plain tensors. What neither is belongs to no weight: an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ...errors import InvalidCheckpoint, cause_of
from ...quantized.matrix import QuantizedMatrix
from ...spec import FLOATS
from ..refusals import BUFFERS
from ..safetensors_header import StoredTensor
from .auto_round import read_auto_round
from .awq import read_awq
from .bitsandbytes import read_bitsandbytes
from .complete import refuse_incomplete
from .compressed_tensors import read_compressed_tensors
from .description import Description
from .fp8 import read_fbgemm, read_fp8
from .gptq import read_gptq
from .hqq import read_hqq
from .modelopt import read_modelopt
from .mxfp4 import read_mxfp4
from .olive import read_olive
from .stored import FIX, Stored
from .torchao import read_torchao
from .unread import notes_of, refuse_transforms

Reader = Callable[[Description, Stored], Iterator[tuple[str, QuantizedMatrix]]]
READERS: dict[str, Reader] = {
    "auto-round": read_auto_round,
    "awq": read_awq,
    "bitsandbytes": read_bitsandbytes,
    "compressed-tensors": read_compressed_tensors,
    "fbgemm_fp8": read_fbgemm,
    "fp8": read_fp8,
    "gptq": read_gptq,
    "hqq": read_hqq,
    "modelopt": read_modelopt,
    "mxfp4": read_mxfp4,
    "olive": read_olive,
    "torchao": read_torchao,
}
"""method -> its reader"""
BESIDE_WEIGHTS = re.compile(
    r"\.(weight_(scale|scale_2|scale_inv|packed|shape|zero_point|global_scale|g_idx)|input_(scale|global_scale|"
    r"zero_point|scale_ub)|activation_scale|pre_quant_scale|scales|qweight|qzeros|g_idx|absmax|quant_map|nested_absmax|"
    r"nested_quant_map|SCB|weight_format|W_q)$|_(scale_inv|scales|blocks|qdata|weight_scale|weight_zero_point)$|"
    r"\.quant_state\.")
"""names of tensors that belong to a quantized weight. Plain weights of known models have none of them"""
CACHE_SCALES = re.compile(r"\.(k|v|q|kv|prob|output)_(scale|zero_point)$")
"""scales for a quantized cache, which weights do not depend on"""


@dataclass(frozen=True)
class Found:
    """What a folder's tensors are.

    Attributes:
        matrices: quantized weights by name.
        plain: plain tensors by name.
        packed: the tensors that `matrices` are made of.
        notes: what a user must know.
    """

    matrices: dict[str, QuantizedMatrix]
    plain: dict[str, StoredTensor]
    packed: dict[str, StoredTensor]
    notes: tuple[str, ...] = field(default=())


def read_quantized(description: Description, tensors: dict[str, StoredTensor], where: str) -> Found:
    """Read a quantized checkpoint.

    Args:
        description: how it is quantized, by a method of `READERS`.
        tensors: all that are stored.
        where: the checkpoint, for the message.

    Returns:
        Without matrices if no tensor is one of a quantized weight.

    Raises:
        InvalidCheckpoint: a weight lacks a tensor, one does not fit, or one is left over.
        UnsupportedModel: the description has a layout that is not read, or transforms that weights do not hold.
    """
    stored = Stored(tensors, where)
    refuse_transforms(description, where)
    try:
        matrices = dict(READERS[description.method](description, stored))
        refuse_incomplete(description, stored, matrices)
    except (TypeError, ValueError, KeyError, IndexError, OverflowError, ZeroDivisionError, AttributeError) as error:
        raise InvalidCheckpoint(f"the description of the quantization ({description.method}) cannot be applied: "
                                f"{cause_of(error)}", f"{where}, {description.file}", FIX,
                                code="E-CKPT-QUANT-DESCRIPTION") from error
    rest = {name: tensor for name, tensor in tensors.items() if name not in stored.taken}
    cache = sorted(name for name in rest if matrices and CACHE_SCALES.search(name))
    plain = {name: tensor for name, tensor in rest.items() if name not in cache}
    if not matrices:
        return Found({}, tensors, {})
    both = sorted(matrices.keys() & plain.keys())
    orphans = both or [name for name, tensor in sorted(plain.items()) if BESIDE_WEIGHTS.search(name) or (
        tensor.dtype not in FLOATS.values() and not name.endswith(BUFFERS))]
    if orphans:
        tensor = plain[orphans[0]]
        raise InvalidCheckpoint(f"{orphans[0]} ({tensor.dtype} {tensor.shape}) belongs to no quantized weight as "
                                f"{description.method} stores them: a value would be lost", where, FIX,
                                code="E-CKPT-QUANT-ORPHAN")
    notes = (*stored.notes, *notes_of(description))
    notes += (f"scales for a quantized cache are stored and not used: {cache[0]} and {len(cache) - 1} more",) \
        if cache else ()
    return Found(matrices, plain, stored.taken, notes)
