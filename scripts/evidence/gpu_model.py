"""A transformers model that decodes with the grouped-attention op in place of its own attention, on one GPU.

Right: its logits on a small random model, against the same model in fp64 with PyTorch's attention; the error may be at
most twice that of the model with PyTorch's attention in the same precision. Fast: a model of 8 billion random
parameters (or the checkpoint that is given) whose decode step is captured in a CUDA graph, in tokens a second, and
weights and cache that a step reads, over its time, as a share of copy bandwidth.
"""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gqa_plugins.grouped_attention import grouped_query_attention
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig
from transformers.cache_utils import Cache, DynamicCache

NAME = "gqa_op"
STEPS, CAPACITY, PROMPT = 8, 256, 21
LARGE_CAPACITY, LARGE_PROMPT, REPLAYS = 4096, 2048, 32
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8,
         "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": CAPACITY}
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": LARGE_CAPACITY}
"""the shapes of Llama 3 8B"""
CAPTURED_SHARE = 0.01  # of the largest logit: a library may multiply in another order while a graph is captured


class OpCache(Cache):
    """The op's static caches. `update` hands new keys and values on, and the op writes them where they belong; what a
    graph must not hold as a constant, the lengths, is a tensor on the device."""

    def __init__(self, config: Any, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(layers=[])
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (batch, config.num_key_value_heads, capacity, head)
        self.capacity, self.seen = capacity, 0
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.pairs = [[torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)]
                      for _ in range(config.num_hidden_layers)]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any,
               **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The new ones alone."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that are held, as the host counts them."""
        return self.seen

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Tokens that can be held."""
        return self.capacity

    def advance(self, tokens: int) -> None:
        """The step is over."""
        self.lengths += tokens
        self.seen += tokens


@contextmanager
def with_op(model: Any, cache: OpCache, backend: str | None) -> Iterator[None]:
    """While it lasts, the model's attention is the op over this cache."""
    def attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: Any,
               scaling: float | None = None, softcap: float | None = None, sliding_window: int | None = None,
               s_aux: torch.Tensor | None = None, **_: Any) -> tuple[torch.Tensor, None]:
        batch, heads, steps, head = query.shape
        flat = [tensor.transpose(1, 2).reshape(batch, steps, -1) for tensor in (query, key, value)]
        output, _, _ = grouped_query_attention(
            *flat, *cache.pairs[module.layer_idx], cache.lengths, num_heads=heads, kv_num_heads=key.shape[1],
            scale=head**-0.5 if scaling is None else scaling, softcap=softcap or 0.0, window=sliding_window or 0,
            sinks=s_aux, max_length=cache.capacity, backend=backend)
        return output.view(batch, steps, heads, -1), None

    AttentionInterface.register(NAME, attend)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def make_model(shape: dict[str, Any] | str, device: torch.device, dtype: torch.dtype) -> Any:
    """A random Llama of this shape, or the checkpoint in that folder."""
    if isinstance(shape, str):
        return AutoModelForCausalLM.from_pretrained(shape, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, tie_word_embeddings=False), dtype=dtype,
                                                 attn_implementation="sdpa")
    return model.to(device).eval()


def forward(model: Any, tokens: torch.Tensor, cache: Cache, **more: Any) -> torch.Tensor:
    """Logits of the last token. transformers 5.2x renamed the argument that takes the cache."""
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    return model(tokens, **{name: cache}, use_cache=True, logits_to_keep=1, **more).logits[:, -1]


def own_logits(model: Any, prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of every step with the attention and the cache that transformers brings. tokens: fed one by one."""
    cache = DynamicCache(config=model.config)
    return torch.stack([forward(model, step, cache).double() for step in (prompt, *tokens.split(1, 1))])


def op_logits(model: Any, prompt: torch.Tensor, tokens: torch.Tensor, cache: OpCache,
              backend: str | None) -> torch.Tensor:
    """The same through the op."""
    found = []
    with with_op(model, cache, backend):
        for step in (prompt, *tokens.split(1, 1)):
            places = torch.arange(cache.seen, cache.seen + step.shape[1], device=step.device)[None]
            found.append(forward(model, step, cache, position_ids=places).double())
            cache.advance(step.shape[1])
    return torch.stack(found)


@torch.no_grad()
def check_logits(device: torch.device, dtype: torch.dtype, backend: str | None, seed: int = 0) -> dict[str, Any]:
    """The small model through a prompt and STEPS tokens: error, allowed error, whether it passed."""
    torch.manual_seed(seed)
    model = make_model(SMALL, device, torch.float64)
    prompt, tokens = (torch.randint(0, SMALL["vocab_size"], (2, count), device=device) for count in (PROMPT, STEPS))
    model.to(dtype).double()  # weights that both precisions hold exactly
    expected = own_logits(model, prompt, tokens)
    model.to(dtype)
    allowed = 2 * (own_logits(model, prompt, tokens) - expected).abs().max().item() + 1e-6
    cache = OpCache(model.config, 2, CAPACITY, device, dtype)
    error = (op_logits(model, prompt, tokens, cache, backend) - expected).abs().max().item()
    return {"case": f"Llama of {SMALL['num_hidden_layers']} layers, {str(dtype).removeprefix('torch.')}, prompt "
                    f"{PROMPT}, {STEPS} steps", "kernel": "transformers' model with our op", "error": error,
            "allowed": allowed, "passed": error <= allowed}


def capture_step(model: Any, cache: OpCache, token: torch.Tensor) -> tuple[Callable[[], None], torch.Tensor]:
    """(what runs one decode step, its logits): a CUDA graph in which the step advances the lengths itself."""
    places = cache.lengths[:, None].long()

    def step() -> torch.Tensor:
        places.copy_(cache.lengths[:, None])
        logits = forward(model, token, cache, position_ids=places)
        cache.lengths += 1
        return logits

    before = cache.lengths.clone()
    for _ in range(2):  # compiles and loads what a capture may not
        step()
    replay, logits = capture(step)
    cache.lengths.copy_(before)
    return replay, logits


def capture(step: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """(what replays the step, the tensor that holds its result after each replay)."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


def clock(run: Callable[[], None]) -> float:
    """Median time of a replay, in ms."""
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


@torch.no_grad()
def time_decode(checkpoint: str | None, device: torch.device, copy_gb_s: float,
                backend: str | None = None) -> dict[str, Any]:
    """Decode of the large model at batch 1 in a captured graph, whose first step must be that of the call outside."""
    dtype = torch.bfloat16
    torch.manual_seed(0)
    model = make_model(checkpoint or LARGE, device, dtype)
    config = model.config
    cache = OpCache(config, 1, LARGE_CAPACITY, device, dtype)
    prompt = torch.randint(0, config.vocab_size, (1, LARGE_PROMPT), device=device)
    token = prompt[:, -1:].clone()
    with with_op(model, cache, backend):
        forward(model, prompt, cache, position_ids=torch.arange(LARGE_PROMPT, device=device)[None])
        cache.advance(LARGE_PROMPT)
        outside = forward(model, token, cache, position_ids=cache.lengths[:, None].long()).clone()
        replay, logits = capture_step(model, cache, token)
        replay()
        difference = (outside.double() - logits.double()).abs().max().item()
        largest = outside.double().abs().max().item()
        milliseconds = clock(replay)
    read = sum(p.numel() * p.element_size() for p in model.parameters())
    if not config.tie_word_embeddings:  # of the embedding one row is read
        read -= model.get_input_embeddings().weight.nbytes
    read += sum(tensor[:, :, :LARGE_PROMPT].nbytes for pair in cache.pairs for tensor in pair)
    return {"model": checkpoint or "8B random", "length": LARGE_PROMPT, "step_ms": milliseconds,
            "tokens_s": 1000 / milliseconds, "of_copy": read / milliseconds / 1e6 / copy_gb_s,
            "difference": difference, "passed": difference <= CAPTURED_SHARE * largest}


def check_model(device: torch.device, checkpoint: str | None, copy_gb_s: float | None) -> dict[str, Any]:
    """What the stage adds to the results."""
    rows = [check_logits(device, dtype, None) for dtype in (torch.bfloat16, torch.float32)]
    found: dict[str, Any] = {"model": rows}
    if copy_gb_s is not None:
        found["model_speed"] = time_decode(checkpoint, device, copy_gb_s)
    return found
