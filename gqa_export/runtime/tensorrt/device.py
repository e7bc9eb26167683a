"""The engine on a GPU: TensorRT's contexts over torch CUDA tensors, nothing copied but ids, lengths and logits.

One context per profile (decode, prefill) on one stream. The cache is one tensor per input, bound as input and as the
output that aliases it. From the second decode step of a batch size on, the step is a CUDA graph: the first one runs as
it is, because a plugin loads its kernels then, which no capture may see. Not yet run on a GPU: the tests hold it to
stand-ins for TensorRT's objects and torch's streams that read and write the very addresses they are given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...bundle.engine_facts import DECODE, PREFILL, REBUILD
from ...bundle.manifest import Manifest
from ...errors import GqaExportError, cause_of
from ...graph_io import HIDDEN_STATES, INPUT_IDS, LOGITS, NEW_LENGTHS, PAST_LENGTHS, past_names, present_names
from ...quantized.kv_codes import decode
from ...spec import AttentionSpec
from ..rings import dead_slots

ALIGNMENT = 256  # bytes; TensorRT takes no tensor at another address. CUDA's own allocations begin at such a one


def cuda_device(number: int) -> Any:
    """CUDA device `number` as torch names it."""
    import torch

    return torch.device("cuda", number)


class DeviceBackend:
    """An `EngineBackend` on a torch device. trt: the module of the engine's flavour."""

    def __init__(self, trt: Any, folder: Path, manifest: Manifest, device: Any, cuda_graph: bool) -> None:
        import torch

        facts = manifest.engine
        assert facts is not None
        self._torch, self._manifest, self._where = torch, manifest, str(folder / facts.file)
        self.device = device
        self._dtype = getattr(torch, manifest.dtype)
        self._kv = manifest.kv_cache
        self._cached = getattr(torch, self._kv.dtype) if self._kv else self._dtype
        self._use_graph = cuda_graph
        self._failures: list[Any] = []
        if facts.plugin is not None:
            from gqa_plugins.grouped_attention import tensorrt as plugin

            plugin.register(trt)
            self._failures = plugin.failures
        with torch.cuda.device(self.device):
            self.stream = torch.cuda.Stream(self.device)
            # kept: TensorRT wants its logger and runtime to live as long as the engine
            self._logger = trt.Logger(trt.Logger.WARNING)
            self._runtime = trt.Runtime(self._logger)
            self._engine = self._runtime.deserialize_cuda_engine((folder / facts.file).read_bytes())
            if self._engine is None:
                raise self._refusal("cannot be opened", REBUILD, code="E-ENGINE-OPEN")
            self._contexts = {}
            for name in (DECODE, PREFILL):
                context = self._engine.create_execution_context()
                if context is None:
                    raise self._refusal("does not find its working memory on this GPU", "free memory on the GPU, or "
                                        "build with a smaller --max-prompt, --max-batch or --capacity",
                                        code="E-ENGINE-MEMORY")
                number = facts.profile(name)[0]
                if not context.set_optimization_profile_async(number, self.stream.cuda_stream):
                    raise self._refusal(f"refuses its {name} profile", REBUILD, code="E-ENGINE-INPUT")
                self._contexts[name] = context
        self.caches: list[Any] = []
        self._graph: Any = None
        self._hidden: Any = None
        self._batch, self._warm = 0, False

    def allocate(self, batch: int) -> None:
        """See `EngineBackend.allocate`. The same batch size keeps its memory and its graph."""
        torch, spec = self._torch, self._manifest.spec
        if batch == self._batch:
            for tensor in self.caches:
                tensor.zero_()
            return
        self._graph, self._warm, self._batch = None, False, batch
        self.caches = [torch.zeros((batch, layer.kv_num_heads, self._slots(layer) or self._manifest.capacity, size),
                                   dtype=self._cached, device=self.device)
                       for layer in spec.owners for size in (layer.head_size, layer.value_head_size)]
        self._ids = torch.zeros((batch, 1), dtype=torch.int32, device=self.device)
        self._past, self._new = (torch.zeros(batch, dtype=torch.int32, device=self.device) for _ in range(2))
        self._logits = torch.zeros((batch, 1, spec.vocabulary), dtype=self._dtype, device=self.device)
        if any(fact.name == HIDDEN_STATES for fact in self._manifest.outputs):
            facts = self._manifest.engine
            assert facts is not None
            self._hidden = torch.zeros(batch * facts.max_prompt * spec.hidden_size, dtype=self._dtype,
                                       device=self.device)

    def run(self, ids: Any, past: np.ndarray, new: np.ndarray, row: int) -> Any:
        """See `EngineBackend.run`. ids may be a tensor on the device."""
        torch = self._torch
        inputs = [torch.as_tensor(each) for each in (ids, past, new)]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            if inputs[0].shape == self._ids.shape:
                for tensor, content in zip((self._ids, self._past, self._new), inputs):
                    tensor.copy_(content)
                logits = self._decode()
            else:
                inputs = [each.to(self.device, torch.int32) for each in inputs]
                logits = self._logits[: len(inputs[0])]
                self._enqueue(DECODE if inputs[0].shape[1] == 1 else PREFILL, inputs, row, logits)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return logits

    def _decode(self) -> Any:
        """One token for every row, from and into fixed memory."""
        torch, inputs = self._torch, [self._ids, self._past, self._new]
        if not (self._use_graph and self._warm):
            self._enqueue(DECODE, inputs, 0, self._logits)
            self._warm = True
            return self._logits
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=self.stream):
                    self._enqueue(DECODE, inputs, 0, self._logits)
            except RuntimeError as error:
                raise self._refusal(f"cannot be captured in a CUDA graph ({cause_of(error)})",
                                    "load it with cuda_graph=False", code="E-ENGINE-CAPTURE") from error
            self._graph = graph
        self._graph.replay()
        return self._logits

    def _enqueue(self, profile: str, inputs: list[Any], row: int, logits: Any) -> None:
        """Bind everything by address and launch on the stream that is current."""
        context, rows = self._contexts[profile], len(inputs[0])
        for name, tensor in zip((INPUT_IDS, PAST_LENGTHS, NEW_LENGTHS), inputs):
            self._bind(context, name, tensor)
        names = [pair for layer in self._manifest.spec.owners
                 for pair in zip(past_names(layer.layer), present_names(layer.layer))]
        apart = []
        for (past, present), cache in zip(names, self.caches, strict=True):
            part = cache[row: row + rows]
            if (part.data_ptr() - cache.data_ptr()) % ALIGNMENT:
                part = part.clone()  # memory of its own is aligned; TensorRT does not take other addresses
                apart.append((cache[row: row + rows], part))
            self._bind(context, past, part)
            context.set_tensor_address(present, part.data_ptr())
        context.set_tensor_address(LOGITS, logits.data_ptr())
        if self._hidden is not None:
            context.set_tensor_address(HIDDEN_STATES, self._hidden.data_ptr())
        stream = self._torch.cuda.current_stream(self.device).cuda_stream
        if not context.execute_async_v3(stream):
            raise self._refusal(f"did not run ({profile}, {list(inputs[0].shape)})",
                                "rerun with --debug, and report it with TensorRT's own messages above",
                                code="E-ENGINE-RUN")
        for place, part in apart:
            place.copy_(part)

    def _bind(self, context: Any, name: str, tensor: Any) -> None:
        if not context.set_input_shape(name, tuple(tensor.shape)):
            raise self._refusal(f"refuses {name} of {list(tensor.shape)}", REBUILD, code="E-ENGINE-INPUT")
        context.set_tensor_address(name, tensor.data_ptr())

    def _refusal(self, message: str, fix: str, *, code: str) -> Exception:
        """What a callback of the plugin refused, which TensorRT swallows; else an error of our own."""
        if self._failures:
            refused: Exception = self._failures[0]
            return refused
        return GqaExportError(f"the engine {message}", self._where, fix, code=code)

    def join(self, communicator: Any) -> None:
        """Give every context the communicator of this rank; all ranks do so at once.

        Args:
            communicator: capsule of an ncclComm_t.

        Raises:
            GqaExportError: TensorRT does not take it.
        """
        with self._torch.cuda.device(self.device):
            for name, context in self._contexts.items():
                if not context.set_communicator(communicator):
                    raise self._refusal(f"refuses NCCL's communicator ({name})", "see TensorRT's messages above",
                                        code="E-RUN-COMMUNICATOR")

    def done(self) -> bool:
        """Whether what was launched last has ended."""
        return bool(self.stream.query())

    def host(self, logits: Any) -> np.ndarray:
        """See `EngineBackend.host`."""
        found: np.ndarray = logits.float().cpu().numpy()
        return found

    def hidden(self, rows: int, tokens: int) -> np.ndarray | None:
        """See `EngineBackend.hidden`."""
        if self._hidden is None:
            return None
        size = self._manifest.spec.hidden_size
        return self.host(self._hidden[: rows * tokens * size].view(rows, tokens, size))

    def cache(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """See `EngineBackend.cache`. bf16 and codes become fp32."""
        low = self._cached in (self._torch.bfloat16, self._torch.float8_e4m3fn)
        arrays = [(tensor.float() if low else tensor).cpu().numpy() for tensor in self.caches]
        if self._kv is not None:
            scales = [scale for each in self._kv.scales for scale in (each.key, each.value)]
            arrays = [decode(codes, scale, 8) for codes, scale in zip(arrays, scales, strict=True)]
        return list(zip(arrays[0::2], arrays[1::2]))

    def copy_row(self, source: int, destination: int, length: int) -> None:
        """See `EngineBackend.copy_row`."""
        for tensor in self.caches:
            tensor[destination, :, :length].copy_(tensor[source, :, :length])

    def clear_row(self, row: int, length: int) -> None:
        """See `EngineBackend.clear_row`."""
        for tensor in self.caches:
            tensor[row, :, length:].zero_()

    def fill_tail(self, lengths: np.ndarray, values: tuple[float, ...]) -> None:
        """See `EngineBackend.fill_tail`."""
        torch, layers = self._torch, self._manifest.spec.owners
        for layer, tensor in zip((layer for layer in layers for _ in range(2)), self.caches, strict=True):
            slots, axis = self._slots(layer), tensor.shape[2]
            tail_BC = (dead_slots(slots, layer.window, lengths) if slots
                       else np.arange(axis) >= np.asarray(lengths)[:, None])
            tail_B1C1 = torch.as_tensor(tail_BC, device=self.device)[:, None, :, None]
            fill_C = torch.as_tensor(np.resize(self._garbage(values), axis), device=self.device)
            tensor.copy_(torch.where(tail_B1C1, fill_C.to(self._cached)[None, None, :, None], tensor))

    def _garbage(self, values: tuple[float, ...]) -> np.ndarray:
        """The values as the cache can hold them: of int8, the largest code and the least."""
        return np.array([127, -128] if self._cached is self._torch.int8 else values)

    def _slots(self, layer: AttentionSpec) -> int:
        """Slots of a layer's ring, 0 where it keeps the whole capacity."""
        windows = self._manifest.window_cache
        return windows.slots(layer) if windows else 0
