"""Every refusal of the grouped-attention entry, with the argument's name and the shapes. Never triton, never a launch.

Dimensions as in `gqa_export.attention_op`. What cannot be known without reading the device (lengths) is a function of
its own, `check_lengths`, because reading it is a synchronisation that a CUDA graph capture forbids. """

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from gqa_plugins.grouped_attention.codes import CACHES
from gqa_plugins.grouped_attention.limits import find_excess

from gqa_export.errors import GqaExportError

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Dimensions:
    """The sizes of one call, by the names of the contract; `rotary_half` is R/2, 0 without rotation."""

    B: int
    S: int
    C: int
    H: int
    K: int
    D: int
    E: int
    rotary_half: int


def _shape(tensor: torch.Tensor) -> str:
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def _refuse(argument: str, what: str, fix: str) -> GqaExportError:
    return GqaExportError(f"{argument}: {what}", where=f"grouped_query_attention, argument {argument}", fix=fix,
                          code="E-RUN-ARGUMENT")


def _expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...], letters: str) -> None:
    if tuple(tensor.shape) != shape:
        wanted = "[" + ", ".join(str(size) for size in shape) + "]"
        raise _refuse(name, f"shape {_shape(tensor)}, expected {letters} = {wanted}",
                      f"pass {name} as {letters}; the other arguments set {wanted}")


def _rank(name: str, tensor: torch.Tensor, rank: int, letters: str) -> None:
    if tensor.dim() != rank:
        raise _refuse(name, f"shape {_shape(tensor)} has {tensor.dim()} dimensions, expected {letters}",
                      f"pass {name} as {letters}")


def check_attributes(*, num_heads: int, kv_num_heads: int, scale: float, softcap: float, window: int) -> None:
    """Refuse head counts, scale, softcap and window that mean nothing."""
    if kv_num_heads < 1 or num_heads < 1 or num_heads % kv_num_heads:
        raise _refuse("num_heads", f"{num_heads} query heads cannot be grouped over kv_num_heads = {kv_num_heads}",
                      "num_heads must be a positive multiple of kv_num_heads")
    if not math.isfinite(scale):
        raise _refuse("scale", f"{scale} is not a finite number", "pass 1 / sqrt(D), or what the model defines")
    if not (math.isfinite(softcap) and softcap >= 0):
        raise _refuse("softcap", f"{softcap} is not a finite number >= 0", "pass 0 for no soft cap")
    if not 0 <= window < 2**31:
        raise _refuse("window", f"{window} is out of range", "tokens visible including the current one; 0 for all")


def check_scales(key_scale: float | None, value_scale: float | None) -> None:
    """Refuse scales of codes that are not a pair of positive numbers."""
    for name, scale, other in (("key_scale", key_scale, value_scale), ("value_scale", value_scale, key_scale)):
        if scale is None and other is not None:
            raise _refuse(name, "is absent, but its pair is given", "pass both, or neither for caches of numbers")
        if scale is not None and not (math.isfinite(scale) and scale > 0):
            raise _refuse(name, f"{scale} is not a positive number", "pass the step between two codes")


def _check_kinds(tensors: dict[str, torch.Tensor], reference: bool, coded: bool) -> None:
    query = tensors["query"]
    allowed = {**DTYPES, torch.float64: "fp64"} if reference else DTYPES
    if query.dtype not in allowed:
        raise _refuse("query", f"dtype {query.dtype} is not supported here",
                      f"use one of {', '.join(str(dtype) for dtype in allowed)}"
                      + ("" if reference else '; backend="reference" also takes torch.float64'))
    for name, tensor in tensors.items():
        if name in ("past_lengths", "new_lengths"):
            if tensor.dtype != torch.int32:
                raise _refuse(name, f"dtype {tensor.dtype}, expected torch.int32", f"pass {name}.to(torch.int32)")
        elif name in ("past_key", "past_value") and (coded or tensor.dtype in CACHES):
            if not coded:
                raise _refuse(name, f"holds codes ({tensor.dtype}), and their scales are missing",
                              "pass key_scale and value_scale to grouped_query_attention")
            if tensor.dtype not in CACHES or tensor.dtype != tensors["past_key"].dtype:
                raise _refuse(name, f"dtype {tensor.dtype}, but key_scale and value_scale are of codes",
                              f"allocate both caches as {' or '.join(str(dtype) for dtype in CACHES)}, or leave the "
                              "scales out")
        elif tensor.dtype != query.dtype:
            raise _refuse(name, f"dtype {tensor.dtype}, but query is {query.dtype}", f"pass {name}.to({query.dtype})")
        if tensor.device != query.device:
            raise _refuse(name, f"on {tensor.device}, but query is on {query.device}",
                          f"move {name} to {query.device}")


def _check_caches(past_key: torch.Tensor, past_value: torch.Tensor) -> None:
    for name, cache in (("past_key", past_key), ("past_value", past_value)):
        if not cache.is_contiguous():
            raise _refuse(name, f"shape {_shape(cache)} with strides {tuple(cache.stride())} is not contiguous",
                          "allocate the cache as [B, K, C, head size] and pass it whole: it is written in place")
    # While a call is compiled, tensors have no address yet.
    if torch.compiler.is_compiling() or past_key.is_meta or not past_key.numel():
        return
    if past_key.data_ptr() == past_value.data_ptr():
        raise _refuse("past_value", "shares its memory with past_key", "allocate two caches")


def check(query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None, past_key: torch.Tensor,
          past_value: torch.Tensor, past_lengths: torch.Tensor, new_lengths: torch.Tensor | None,
          cos: torch.Tensor | None, sin: torch.Tensor | None, sinks: torch.Tensor | None, *, num_heads: int,
          kv_num_heads: int, scale: float, softcap: float, window: int, max_length: int | None,
          reference: bool = False, ring: bool = False, key_scale: float | None = None,
          value_scale: float | None = None) -> Dimensions:
    """Check everything that shapes, types, devices and strides tell; return the sizes.

    reference: the plain PyTorch backend runs it, so fp64 and any head size are fine. ring: the caches are. key_scale,
    value_scale: of caches of codes; None: they hold numbers. Raises GqaExportError.
    """
    check_attributes(num_heads=num_heads, kv_num_heads=kv_num_heads, scale=scale, softcap=softcap, window=window)
    if (key is None) != (value is None):
        missing = "key" if key is None else "value"
        raise _refuse(missing, "is absent, but its pair is given",
                      "pass both, or neither for a layer that reads another layer's cache")
    if (cos is None) != (sin is None):
        missing = "cos" if cos is None else "sin"
        raise _refuse(missing, "is absent, but its pair is given", "pass both, or neither for rotated inputs")
    given = {"query": query, "key": key, "value": value, "past_key": past_key, "past_value": past_value,
             "past_lengths": past_lengths, "new_lengths": new_lengths, "cos": cos, "sin": sin, "sinks": sinks}
    for name, item in given.items():
        if item is not None and not isinstance(item, torch.Tensor):
            raise _refuse(name, f"is a {type(item).__name__}, not a tensor", f"pass {name} as a torch.Tensor")
    check_scales(key_scale, value_scale)
    _check_kinds({name: item for name, item in given.items() if item is not None}, reference, key_scale is not None)
    _rank("query", query, 3, "[B, S, H*D]")
    _rank("past_key", past_key, 4, "[B, K, C, D]")
    _rank("past_value", past_value, 4, "[B, K, C, E]")
    B, S, H, K = query.shape[0], query.shape[1], num_heads, kv_num_heads
    C, D, E = past_key.shape[2], past_key.shape[3], past_value.shape[3]
    _expect("past_key", past_key, (B, K, C, D), "[B, K, C, D]")
    _expect("past_value", past_value, (B, K, C, E), "[B, K, C, E]")
    _expect("query", query, (B, S, H * D), "[B, S, H*D]")
    if key is not None and value is not None:
        _expect("key", key, (B, S, K * D), "[B, S, K*D]")
        _expect("value", value, (B, S, K * E), "[B, S, K*E]")
    _expect("past_lengths", past_lengths, (B,), "[B]")
    if new_lengths is not None:
        _expect("new_lengths", new_lengths, (B,), "[B]")
    if sinks is not None:
        _expect("sinks", sinks, (H,), "[H]")
    half = _check_rotary(cos, sin, D)
    _check_caches(past_key, past_value)
    if not reference:
        excess = find_excess(B, K, C, D, E)
        if excess is not None:
            raise _refuse(excess.argument, excess.message, excess.fix)
    if ring and not 0 < window <= C:
        raise _refuse("window", f"{window} with a ring of C = {C} slots",
                      "a ring needs a window and at least as many slots")
    if max_length is not None:
        if not 0 <= max_length <= (2**31 - 1 if ring else C):
            raise _refuse("max_length",
                          f"{max_length} is outside 0 .. C = {C}, the capacity of past_key {_shape(past_key)}",
                          "allocate a larger cache, or stop generating: past + new must fit")
        check_table(cos, max_length)
    return Dimensions(B, S, C, H, K, D, E, half)


def _check_rotary(cos: torch.Tensor | None, sin: torch.Tensor | None, D: int) -> int:
    if cos is None or sin is None:
        return 0
    _rank("cos", cos, 2, "[M, R/2]")
    _expect("sin", sin, tuple(cos.shape), "[M, R/2], as cos")
    if not (cos.shape[0] >= 1 and cos.shape[1] >= 1 and 2 * cos.shape[1] <= D):
        raise _refuse("cos", f"shape {_shape(cos)} does not fit head size D = {D}",
                      f"a rotary table is [M, R/2] with M >= 1 and R <= D = {D}")
    return cos.shape[1]


def check_table(cos: torch.Tensor | None, longest: int) -> None:
    """Refuse a rotary table that ends before the longest sequence does."""
    if cos is not None and longest > cos.shape[0]:
        raise _refuse("cos", f"shape {_shape(cos)} has no row for position {longest - 1}",
                      f"build cos and sin for at least {longest} positions")


def check_lengths(past_lengths: torch.Tensor, new_lengths: torch.Tensor | None, sizes: Dimensions,
                  cos: torch.Tensor | None, ring_window: int = 0) -> None:
    """Read the lengths (a synchronisation on CUDA) and refuse what would not fit, naming the sequence. ring_window: of
    caches that are rings, 0 where they are not."""
    past = past_lengths.tolist()
    new = [sizes.S] * sizes.B if new_lengths is None else new_lengths.tolist()
    for b, (before, fresh) in enumerate(zip(past, new, strict=True)):
        if before < 0:
            raise _refuse("past_lengths", f"sequence {b} has {before}", "lengths are counts of tokens, 0 or more")
        if not 0 <= fresh <= sizes.S:
            raise _refuse("new_lengths", f"sequence {b} has {fresh}, outside 0 .. S = {sizes.S}",
                          "new_lengths counts the valid tokens of a right-padded row")
        most = sizes.C - ring_window + 1
        if ring_window and fresh > most:
            raise _refuse("new_lengths", f"sequence {b} has {fresh}: a ring of {sizes.C} slots and a window of "
                          f"{ring_window} takes at most {most} new tokens", "feed them in pieces")
        if not ring_window and before + fresh > sizes.C:
            raise _refuse("past_lengths",
                          f"sequence {b}: past {before} + new {fresh} exceeds the capacity C = {sizes.C}",
                          "allocate a larger cache, or stop generating")
    if past:
        check_table(cos, max(before + fresh for before, fresh in zip(past, new, strict=True)))
