"""The reference of every comparison: PyTorch eager, one sequence at a time, unpadded, each with a cache of its own.

Padding cannot influence a row that never sees any. No cache drops what lies outside a sliding window: there would be
nothing to compare a full cache with. Dimensions as in `gqa_export.attention_op`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from ..checkpoint.cache_argument import cache_argument
from ..errors import GqaExportError
from ..quantized.kv_codes import TIE
from ..spec import FLOATS, KvCache, ModelSpec
from ..trace.states.torch_cache import empty_cache, has_keys, kept_states, observed_states, says_length, states_of_row
from .feeds import check_feed
from .quantized_cache import follow, quantized_cache
from .roomy_cache import roomy_cache
from .rows import RowSlots
from .session import Step
from .widened import widened

DTYPES = {name: getattr(torch, full) for short, full in FLOATS.items() for name in (short, full)}
"""number formats by their short and by their full names"""


class TorchSession(RowSlots):
    """A `Session` over any causal language model of transformers.

    model: the module; it is copied if `dtype` is not its own, and left as it is; in fp64 the copy shares its matrices
    (`gqa_export.runtime.widened`). dtype: a name such as "fp32" or a torch dtype.
    fp64 means fp64 throughout: transformers computes norms and softmax in fp32 by explicit casts, and
    those are widened too; only the rotary angles stay as the model defines them, in fp32.
    spec: what `session.spec` answers; not needed to run. kv: how the cache is quantized, None: it is not. tie: see
    `gqa_export.runtime.quantized_cache`. hidden: steps give the last hidden states too, as transformers gives them.
    """

    def __init__(self, model: torch.nn.Module, capacity: int, dtype: str | torch.dtype = "fp32", *,
                 spec: ModelSpec | None = None, kv: KvCache | None = None, tie: float = TIE,
                 hidden: bool = False) -> None:
        wanted = DTYPES[dtype] if isinstance(dtype, str) else dtype
        if any(p.dtype != wanted for p in model.parameters() if p.is_floating_point()):
            model = widened(model) if wanted is torch.float64 else copy.deepcopy(model).to(wanted)
        model.eval()
        loose: Any = model  # its methods are transformers', not torch's
        self.model = loose
        self.dtype, self.capacity, self._spec = wanted, capacity, spec
        self.vocabulary = int(loose.get_input_embeddings().weight.shape[0])
        self._modes: tuple[TorchFunctionMode, ...] = (_Widen(model),) if wanted is torch.float64 else ()
        self._states = observed_states(self.model.config)
        self._kv, self._tie, self._hidden = kv, tie, hidden
        self._followed: tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]] | None = None
        self.reset(1)

    @property
    def spec(self) -> ModelSpec:
        """The spec it was given; GqaExportError if none was."""
        if self._spec is None:
            raise GqaExportError("this PyTorch session was made without a spec", "TorchSession",
                                 "pass spec=manifest.spec", code="E-RUN-SPEC")
        return self._spec

    @property
    def lengths(self) -> np.ndarray:
        """int64 [B]."""
        return self._lengths.copy()

    @contextmanager
    def redrawn(self, seed: int) -> Iterator[None]:
        """Inside, every matrix product is rounded at random: another draw of this number format's rounding errors."""
        with self.under(_Redraw(seed), f"redrawn {seed}"):
            yield

    @contextmanager
    def under(self, mode: TorchFunctionMode, name: str) -> Iterator[None]:
        """Inside, the model runs under this mode too. name: tells it from other modes, where answers are kept."""
        before = self._modes
        self._modes = (*before, mode)
        try:
            yield
        finally:
            self._modes = before

    @contextmanager
    def attending(self, implementation: str) -> Iterator[Any]:
        """Inside, the model that is given has this attention, and this session's number format."""
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(implementation)
        try:
            with ExitStack() as stack:
                for mode in self._modes:
                    stack.enter_context(mode)
                yield self.model
        finally:
            self.model.set_attn_implementation(before)

    def reset(self, batch: int) -> None:
        """Empty caches for `batch` sequences."""
        self._begin_rows(batch)
        self._caches = [self._nothing() for _ in range(batch)]

    def step(self, input_ids: np.ndarray, new_lengths: np.ndarray | None = None, *, want_cache: bool = False) -> Step:
        """See `Session.step`. Logits are fp64 for an fp64 session and fp32 otherwise."""
        ids, new = check_feed(input_ids, new_lengths, self._lengths, self.capacity, self.vocabulary)
        before = self._lengths
        sizes = [self.vocabulary, *([self.model.config.get_text_config().hidden_size] if self._hidden else [])]
        answers: list[np.ndarray | None] = [None] * len(sizes)
        followed, self._followed = self._followed, None
        for b, count in enumerate(new.tolist()):
            if followed is not None:
                follow(self._caches[b], *([each[b, :, :count] for each in side] for side in followed))
            pieces = [self._row(ids[b: b + 1, start: stop], self._caches[b], int(before[b]) + start)
                      for start, stop in kept_states(self._states, int(before[b]), count)]
            if pieces:
                row = pieces[0] if len(pieces) == 1 else tuple(map(np.concatenate, zip(*pieces)))
                answers = [self._placed(ids.shape, whole, b, part) for whole, part in zip(answers, row)]
        self._lengths = before + new
        dtype = np.float64 if self.dtype is torch.float64 else np.float32
        logits, *more = [np.zeros((*ids.shape, size), dtype) if whole is None else whole
                         for whole, size in zip(answers, sizes)]
        hidden = more[0] if more else None
        if not want_cache:
            return Step(logits, hidden=hidden)
        keys, values = self._stacked(before, new, ids.shape[1])
        return Step(logits, keys, values, tuple(self.states()), hidden)

    def _placed(self, shape: tuple[int, ...], whole: np.ndarray | None, row: int, part: np.ndarray) -> np.ndarray:
        """What a row [new, size] answered put into the array [batch, new, size] of all rows, made where there is none;
        zeros for rows without an answer. The only row of a batch is not copied."""
        if whole is None and shape[0] == 1 and len(part) == shape[1]:
            return part[None]
        whole = np.zeros((*shape, part.shape[-1]), part.dtype) if whole is None else whole
        whole[row, : len(part)] = part
        return whole

    def follow(self, keys: tuple[np.ndarray, ...], values: tuple[np.ndarray, ...]) -> None:
        """Let the next step take the codes of these new keys and values [B, K, S, D], one array for each layer, where
        they are as right as its own."""
        self._followed = keys, values

    def quantized_layers(self, row: int) -> list[Any]:
        """The layers of one sequence's quantized cache (`gqa_export.runtime.quantized_cache.QuantizedLayer`)."""
        return list(self._caches[row].layers)

    def states(self) -> list[np.ndarray]:
        """Every state of fixed size [B, *shape], as the export keeps it; zeros for a sequence without tokens."""
        rows = [states_of_row(cache, self._states) for cache in self._caches]
        dtype = np.float64 if self.dtype is torch.float64 else np.float32
        return [np.stack([np.zeros(state.shape, dtype) if row[place] is None else _numpy(row[place])  # type: ignore[arg-type]
                          for row in rows]) for place, state in enumerate(self._states)]

    def _nothing(self) -> Any:
        if self._kv is not None:
            return quantized_cache(self._kv, self._tie)
        return empty_cache(self.model.config) if self._states else roomy_cache(self.capacity)

    def _has_states(self) -> bool:
        return bool(self._states)

    def _states_of(self, row: int) -> Any:
        return copy.deepcopy(self._caches[row])

    def _keep(self, source: int, destination: int, length: int, states: Any) -> None:
        if length == 0 or states is not None:  # what is kept of a row with states is its whole cache
            self._caches[destination] = copy.deepcopy(states) if length else self._nothing()
            return
        cache = self._caches[source] if source == destination else copy.deepcopy(self._caches[source])
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        self._caches[destination] = cache

    def _row(self, ids: np.ndarray, cache: Any, past: int) -> tuple[np.ndarray, ...]:
        """Logits [S, V] and, if wanted, hidden states [S, X] of one row."""
        previous = self.model.config._attn_implementation
        if previous != "eager":
            self.model.set_attn_implementation("eager")
        try:
            with torch.no_grad(), ExitStack() as modes:
                args = {"input_ids": torch.from_numpy(ids), cache_argument(self.model): cache, "use_cache": True}
                if self._states:  # as `generate` does: not every model with states counts those of the past itself
                    args["position_ids"] = torch.arange(past, past + ids.shape[1])[None]
                    says_length(cache, past)
                for mode in self._modes:
                    modes.enter_context(mode)
                if not self._hidden:
                    return (_numpy(self.model(**args).logits[0]),)
                answer = self.model(**args, output_hidden_states=True)
                return _numpy(answer.logits[0]), _numpy(answer.hidden_states[-1][0])
        finally:
            if previous != "eager":
                self.model.set_attn_implementation(previous)

    def cache(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per cache-owning layer (key [B, K, T, D], value [B, K, T, E]), T the longest sequence; zeros beyond."""
        keys, values = self._stacked(np.zeros_like(self._lengths), self._lengths, int(self._lengths.max()))
        return list(zip(keys, values))

    def _stacked(self, starts: np.ndarray, counts: np.ndarray, width: int) -> tuple[tuple[np.ndarray, ...], ...]:
        """Keys and values of every layer that owns a cache, [B, K, width, D or E]: of each sequence `counts` tokens
        from `starts` on, zeros behind them."""
        layers = max(self._caches, key=lambda cache: len(cache.layers)).layers
        return tuple(tuple(self._stack(number, name, starts, counts, width) for number, layer in enumerate(layers)
                           if not self._states or has_keys(layer)) for name in ("keys", "values"))

    def _stack(self, layer: int, name: str, starts: np.ndarray, counts: np.ndarray, width: int) -> np.ndarray:
        found = [getattr(c.layers[layer], name) if len(c.layers) > layer else None for c in self._caches]
        rows = [None if tensor is None else _numpy(tensor[0, :, start: start + count])
                for tensor, start, count in zip(found, starts.tolist(), counts.tolist(), strict=True)]
        whole: Any = found[0]
        if self._kv is None and len(rows) == 1 and rows[0] is not None and whole.shape[2] == width:
            return rows[0][None]  # a later step writes behind it, or into another tensor
        shape = next((row.shape for row in rows if row is not None), (0, 0, 0))
        dtype = next((row.dtype for row in rows if row is not None), np.dtype(np.float32))
        stacked = np.zeros((len(rows), shape[0], width, shape[2]), dtype=dtype)
        for b, row in enumerate(rows):
            if row is not None:
                stacked[b, :, : row.shape[1]] = row
        return stacked


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    """fp64 stays, everything else becomes fp32 (exact: fp16 and bf16 are subsets of it)."""
    return tensor.detach().to(torch.float64 if tensor.dtype is torch.float64 else torch.float32).numpy()


class _Widen(TorchFunctionMode):
    """Inside, a cast to fp32 gives fp64: without it an "fp64" model still sums its softmax and norms in fp32.

    Rotary modules are left alone: their fp32 angles are part of the model, and an export keeps them.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._narrow = 0
        for module in model.modules():
            if any("inv_freq" in name for name, _ in module.named_buffers(recurse=False)):
                module.register_forward_pre_hook(self._enter_rotary)
                module.register_forward_hook(self._leave_rotary, always_call=True)

    def _enter_rotary(self, *_: Any) -> None:
        self._narrow += 1

    def _leave_rotary(self, *_: Any) -> None:
        self._narrow -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._narrow:
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        elif func is torch.full and "dtype" not in (kwargs or {}) and isinstance(
                args[1] if len(args) > 1 else (kwargs or {}).get("fill_value"), float):
            kwargs = {**(kwargs or {}), "dtype": torch.float64}  # the least fp64 does not fit the default type (XGLM)
        for a in args:  # most calls name no type: this is run for every one
            if a is torch.float32:
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
                break
        if not kwargs:
            return func(*args)
        return func(*args, **{k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()})


PRODUCTS = frozenset((torch.nn.functional.linear, torch.matmul, torch.bmm, torch.addmm, torch.baddbmm,
                      torch.Tensor.matmul, torch.Tensor.__matmul__))


class _Redraw(TorchFunctionMode):
    """Inside, the result of every matrix product is moved at random by up to half a unit in its last place.

    Monte Carlo arithmetic (Parker, 1997): what the outputs then differ by is what rounding alone can do to them.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in PRODUCTS:
            return result
        wide = result.double()
        move = torch.rand(wide.shape, generator=self._random, dtype=torch.float64) - 0.5
        return (wide * (1 + torch.finfo(result.dtype).eps * move)).to(result.dtype)
