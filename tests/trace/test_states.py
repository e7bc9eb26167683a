"""Layers with states of fixed size, traced: the wrapped decoder against transformers, step by step, states too.

The op runs eagerly here, so nothing but the catching is on trial: which states there are, what the kernel functions
compute, what padding and pauses do. Bounds: fp32 sums in another order, on values of about one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gqa_models.shrink import about, small_config
from refusal import refused

from gqa_export.checkpoint.state_kernels import state_kernels
from gqa_export.errors import UnsupportedModel
from gqa_export.runtime.torch_session import TorchSession
from gqa_export.trace import attention_hook
from gqa_export.trace.capture.decoder_module import Decoder
from gqa_export.trace.patches import registry
from gqa_export.trace.probe.layer_probe import probe
from gqa_export.trace.states.kernels import KERNELS

FAMILIES = {
    "qwen3_5_text": {}, "qwen3_next": {}, "lfm2": {}, "nemotron_h": {"time_step_min": 0.9}, "falcon_h1": {},
    "mamba2": {}, "mamba": {}, "falcon_mamba": {}, "jamba": {}, "olmo_hybrid": {}, "kimi_linear": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "mamba", "attention"]},
    "bamba": {"attn_layer_indices": [1, 4]},
}  # fmt: skip
SHARE = 1e-4
"""of the largest value: what fp32 may differ by after a hundred tokens, an order above what was seen"""


def model_of(name: str, **overrides: Any) -> Any:
    """A small model, every parameter random and seeded."""
    from gqa_models import _random_like
    from transformers import AutoModelForCausalLM

    random = torch.Generator().manual_seed(about(name, "seed", 0))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small_config(name, **overrides)).eval()
        for parameter in model.parameters():
            parameter.copy_(_random_like(parameter, random))
    return model


class Wrapped:
    """The decoder that is traced, run eagerly with its states kept between steps."""

    def __init__(self, model: Any) -> None:
        self.spec = probe(model.config)
        self.model = model
        self.decoder = Decoder(model, self.spec, cache="growing", logits="all", interface="lengths")

    def reset(self, rows: int) -> None:
        """Empty cache and states for `rows` sequences."""
        sizes = [(layer.kv_num_heads, 64, size) for layer in self.spec.layers
                 for size in (layer.head_size, layer.value_head_size)]
        self.past = [torch.zeros(rows, *shape) for shape in [*sizes, *(state.shape for state in self.spec.states)]]
        self.lengths = torch.zeros(rows, dtype=torch.int32)

    def step(self, ids: np.ndarray, new: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits and states after a step."""
        new_lengths = torch.tensor(new, dtype=torch.int32)
        previous = self.model.config._attn_implementation
        self.model.set_attn_implementation(attention_hook.register())
        with torch.no_grad(), registry.applied(self.model.config):
            logits, *past = self.decoder(torch.from_numpy(ids), self.lengths, new_lengths, *self.past)
        self.model.set_attn_implementation(previous)
        cached = 2 * len(self.spec.layers)
        self.past = [*(tensor[:, :, :256] for tensor in past[:cached]), *past[cached:]]
        self.lengths = self.lengths + new_lengths
        return logits.numpy(), [tensor.numpy() for tensor in past[cached:]]


def close(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether two arrays are the same but for rounding."""
    return bool(np.abs(found - wanted).max(initial=0) <= SHARE * max(1.0, float(np.abs(wanted).max(initial=0))))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_decoder_with_states_computes_what_transformers_computes(name: str) -> None:
    """Three ragged rows: a prompt longer than a chunk of 64, one token, none at all; then decode, a chunk over a past,
    pauses. Padding holds a real token's id."""
    model = model_of(name, **FAMILIES[name])
    wrapped, reference = Wrapped(model), TorchSession(model, 256)
    wrapped.reset(3)
    reference.reset(3)
    random = np.random.default_rng(5)
    for new in ([70, 1, 0], [1, 1, 2], [3, 0, 5], [1, 1, 1], [0, 4, 1]):
        ids = random.integers(4, 100, (3, max(new)))
        logits, states = wrapped.step(ids, new)
        step = reference.step(ids, np.array(new), want_cache=True)
        for row, count in enumerate(new):
            assert close(logits[row, :count], step.logits[row, :count]), f"logits of row {row} at {new}"
        for spec, found, wanted in zip(wrapped.spec.states, states, step.states or (), strict=True):
            assert close(found, wanted), f"{spec.name} of layer {spec.layer} at {new}"


def test_every_known_kernel_is_marked_in_some_model_and_no_model_is_named_here() -> None:
    from importlib import import_module
    from pathlib import Path

    import transformers

    sources = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    found = {kernel for path in sources for kernel in
             state_kernels(f"transformers.models.{path.parent.name}.{path.stem}").values()}
    assert set(KERNELS) <= found
    folder = Path(import_module("gqa_export.trace.states").__file__ or "").parent
    code = "\n".join(line for path in folder.glob("*.py") for line in path.read_text().splitlines()
                     if "transformers" not in line and "`modeling_" not in line)
    assert not [name for name in FAMILIES if f'"{name}"' in code or f"{name}." in code]


class Broken:
    """A layer's cache used in a way that loses a state."""

    def __init__(self, recorder: Any) -> None:
        from gqa_export.trace.states.stand_in_cache import StandInCache

        self.cache = StandInCache(recorder)


def listener() -> Any:
    """A recorder of shapes."""
    from gqa_export.trace.states.observed import StateListener

    return StateListener()


def test_a_state_that_no_kernel_function_uses_is_refused() -> None:
    cache = Broken(listener()).cache
    cache.update_conv_state(torch.zeros(1, 4, 3), 2, conv_kernel_size=4)
    with refused("E-MODEL-STATE-PATH", UnsupportedModel) as refusal:
        cache.finish()
    assert refusal.error.where == "layer 2"
    cache = Broken(listener()).cache
    cache.get_recurrent_state(5)
    with refused("E-MODEL-STATE-PATH", UnsupportedModel) as refusal:
        cache.finish()
    assert refusal.error.where == "layer 5"


def test_another_state_than_the_kernel_function_returned_is_refused() -> None:
    cache = Broken(listener()).cache
    with refused("E-MODEL-STATE-PATH", UnsupportedModel):
        cache.update_recurrent_state(torch.zeros(1, 4, 3, 3), 2)


def test_an_unknown_method_word_or_kernel_is_refused_by_name() -> None:
    from gqa_export.trace.states.kernels import _stand_in
    from gqa_export.trace.states.stand_in_cache import listening

    cache = Broken(listener()).cache
    with pytest.raises(AttributeError, match="crop_everything"):
        cache.crop_everything()
    with refused("E-MODEL-STATE-PATH", UnsupportedModel) as refusal:
        cache.update_conv_state(torch.zeros(1, 4, 3), 2, conv_kernel_size=4, stride=2)
    assert "`stride`" in refusal.error.what
    x = torch.zeros(1, 4, 3)
    with listening(cache), refused("E-MODEL-STATE-KERNEL", UnsupportedModel) as refusal:
        _stand_in("swirl_fn", test_an_unknown_method_word_or_kernel_is_refused_by_name)(x)
    assert "`swirl_fn`" in refusal.error.what
    with listening(cache), refused("E-MODEL-STATE-ARGUMENT", UnsupportedModel) as refusal:
        _stand_in("causal_conv1d_fn", listener)(x, torch.zeros(4, 2), dilation=2)
    assert "`dilation`" in refusal.error.what


@pytest.mark.parametrize(("name", "layers", "traced"), [
    ("lfm2", ["conv", "conv", "full_attention"], 4),
    ("qwen3_next", ["linear_attention", "linear_attention", "linear_attention", "full_attention"], 4),
    ("mamba2", None, 2)])
def test_depth_costs_nothing_two_layers_of_each_kind_are_traced(name: str, layers: list[str] | None,
                                                                traced: int) -> None:
    from evidence.output_hashes import output_hashes

    from gqa_export.trace.tracing import trace

    depth = 8
    kinds: dict[str, Any] = {"layer_types": (layers * depth)[:depth]} if layers else {}
    config = small_config(name, num_hidden_layers=depth, **kinds)
    options: dict[str, Any] = {"dtype": "float32", "cache": "growing", "capacity": 64}
    stamped, whole = trace(config, **options), trace(config, **options, stamping=False)
    assert (stamped.whole_because, stamped.traced_layers, whole.traced_layers) == ("", traced, depth)
    assert output_hashes(stamped.model) == output_hashes(whole.model)
    assert [port.name for port in stamped.model.graph.input] == [port.name for port in whole.model.graph.input]
    assert [port.name for port in stamped.model.graph.output] == [port.name for port in whole.model.graph.output]
