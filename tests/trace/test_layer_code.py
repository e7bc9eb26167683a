"""Is a layer whose code depends on its depth told from the others, and one whose code does not left alone?

Llama's classes are exchanged for some with other code, as an edited modelling file would have them.
"""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace

import gqa_models
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from evidence.output_hashes import output_hashes
from transformers import AutoConfig
from transformers.models.llama import modeling_llama

from gqa_export.cli import main
from gqa_export.exporting.options import ExportOptions
from gqa_export.exporting.to_onnx import export_onnx
from gqa_export.trace import attention_hook, skeleton, trace_cache
from gqa_export.trace.probe import layer_probe
from gqa_export.trace.stamping import layer_kinds
from gqa_export.trace.tracing import trace

LAYERS = 6
ALIKE = [0] * LAYERS
LATE = [0, 0, 0, 1, 1, 1]
"""layers from the fourth are of another kind"""
ALL_DIFFER = "no layers that are alike"
COUNTED = "something in the model is computed from the number of layers"


def config_of(**overrides):
    values = {**gqa_models.tiny_config("llama"), "num_hidden_layers": LAYERS, "vocab_size": 320, "hidden_size": 64,
              "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, **overrides}
    return AutoConfig.for_model(values.pop("model_type"), **values)


def kinds_of():
    """The kind of each layer, or why there are none."""
    config = config_of()
    model = skeleton.build(config, torch.float32, device="meta", attention=attention_hook.register())
    try:
        stack, _ = layer_kinds.plan(model, layer_probe.probe_layers(config, model))
    except layer_kinds.NotAlike as reason:
        return str(reason)
    return list(stack.kinds)


@pytest.fixture
def layer_code(monkeypatch):
    """Put a function of a layer, its number and its output in front of what the layer returns."""
    def put(after, before=None):
        class Layer(modeling_llama.LlamaDecoderLayer):
            def __init__(self, config, layer_idx):
                super().__init__(config, layer_idx)
                self.layer_idx = layer_idx
                if before is not None:
                    before(self, layer_idx)

            def forward(self, hidden_states, **others):
                return after(self, self.layer_idx, super().forward(hidden_states, **others))

        monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", Layer)

    return put


@pytest.fixture
def loop_code(monkeypatch):
    """Replace pieces of the text of the model's own forward function."""
    def put(*pieces):
        text = inspect.getsource(inspect.unwrap(modeling_llama.LlamaModel.forward))
        text = inspect.cleandoc("\n" + text[text.index("def forward"):].replace("\n    ", "\n"))
        for old, new in pieces:
            assert old in text
            text = text.replace(old, new)
        namespace = dict(vars(modeling_llama))
        exec(compile(text, "<edited>", "exec"), namespace)
        monkeypatch.setattr(modeling_llama.LlamaModel, "forward", namespace["forward"])

    return put


def double(x):
    return x * 2.0


def triple(x):
    return x * 3.0


TABLE = {number: 1.5 if number < 3 else 2.5 for number in range(LAYERS)}
NUMBERS = list(TABLE.values())
FUNCTIONS = [double] * 3 + [triple] * 3
PARTIALS = tuple(functools.partial(torch.clamp, max=4.0 if number < 3 else 5.0) for number in range(LAYERS))


@pytest.mark.parametrize(("after", "kinds"), [
    (lambda _, i, h: h * 2 if i >= 3 else h, LATE),
    (lambda _, i, h: h * 2 if i % 2 else h, [0, 1] * 3),
    (lambda _, i, h: h * 1.25 if i == LAYERS - 1 else h, [0] * 5 + [1]),
    (lambda _, i, h: h * (i + 1), ALL_DIFFER),
    (lambda _, i, h: h / 2 ** i, ALL_DIFFER),
    (lambda _, i, h: h * TABLE[i], LATE),
    (lambda _, i, h: h + NUMBERS[i], LATE),
    (lambda _, i, h: tuple(NUMBERS)[i] - h, LATE),
    (lambda _, i, h: FUNCTIONS[i](h), LATE),
    (lambda _, i, h: PARTIALS[i](h), LATE),
    (lambda _, i, h: h * torch.tensor(NUMBERS[i], device=h.device), LATE),
    (lambda _, i, h: h * torch.tensor([float(i >= 3)] * 64).to(h.device), LATE),
    (lambda _, i, h: h * h.new_tensor([NUMBERS[i]]), LATE),
    (lambda _, i, h: h * torch.full((64,), NUMBERS[i], device=h.device), LATE),
    (lambda _, i, h: h * torch.as_tensor(np.full(64, NUMBERS[i], np.float32), device=h.device), LATE),
    (lambda _, i, h: h * torch.from_numpy(np.full(64, NUMBERS[i], np.float32)).to(h.device), LATE),
    (lambda _, i, h: torch.where(h > 0, h, NUMBERS[i]), LATE),
    (lambda _, i, h: h.clamp(min=-NUMBERS[i]), LATE),
    (lambda _, i, h: h.roll(i // 3, -1), LATE),
    (lambda _, i, h: h + h[..., i // 3, None], LATE),
    (lambda _, i, h: h[..., [i // 3, *range(1, 64)]], LATE),
    (lambda _, i, h: h.to(torch.float64).to(h.dtype) if i >= 3 else h, LATE),
    (lambda layer, i, h: (layer.input_layernorm if i < 3 else layer.post_attention_layernorm)(h), LATE),
    (lambda _, i, h: (a := h + 1, b := h + 2, (a if i < 3 else b) * 2)[-1], LATE),
    (lambda _, i, h: h.mul_(NUMBERS[i]), LATE),
], ids=lambda value: value if isinstance(value, str) else "kinds" if isinstance(value, list) else None)
def test_a_depth_that_reaches_what_a_layer_computes_is_a_kind_of_its_own(layer_code, after, kinds):
    layer_code(after)
    assert kinds_of() == kinds


@pytest.mark.parametrize("after", [
    lambda _, i, h: h,
    lambda _, i, h: h if i >= 0 else h * 2,
    lambda _, i, h: h * TABLE[0] + torch.tensor(3.0),
    lambda layer, i, h: layer.notes[f"layer {i}"] * h,
], ids=["unused", "same branch", "same number", "same entry"])
def test_a_depth_that_reaches_no_result_splits_nothing(layer_code, after):
    layer_code(after, before=lambda layer, i: setattr(layer, "notes", {f"layer {n}": 2.0 for n in range(LAYERS)}))
    assert kinds_of() == ALIKE


@pytest.mark.parametrize(("held", "kinds"), [
    (lambda i: [1, 2 if i < 3 else 3], LATE),
    (lambda i: (1, (2, i < 3)), LATE),
    (lambda i: {"limit": {"short": 16 if i < 3 else 32}}, LATE),
    (lambda i: double if i < 3 else triple, LATE),
    (lambda i: functools.partial(double, i // 3), LATE),
    (lambda i: (lambda x: x * i // 3) if i < 0 else (lambda x, by=i // 3: x * by), LATE),
    (lambda i: SimpleNamespace(short=16 if i < 3 else 32), LATE),
    (lambda i: np.arange(2) + i // 3, LATE),
    (lambda i: [double, {"a": (1, 2)}, functools.partial(triple, 1), lambda x: x + 1, np.float32(2)], ALIKE),
    (lambda i: {"layer_idx": i, "scale": 2.0}, ALIKE),
], ids=["list", "tuple", "dict", "function", "partial", "default", "object", "array", "equal", "place"])
def test_what_a_module_holds_counts_by_value_and_functions_by_their_code(layer_code, held, kinds):
    layer_code(lambda _, __, h: h, before=lambda layer, i: setattr(layer, "held", held(i)))
    assert kinds_of() == kinds


@pytest.mark.parametrize("put", [
    lambda layer, i: setattr(layer, "scale", torch.tensor(1.0 + i)),
    lambda layer, i: setattr(layer.mlp, "scales", [torch.tensor(1.0 + i)]),
    lambda layer, i: layer.register_buffer("scale", torch.tensor(1.0 + i), persistent=False),
], ids=["attribute", "list", "buffer"])
def test_a_tensor_that_a_layer_makes_for_itself_is_traced_as_it_is(layer_code, put):
    layer_code(lambda _, __, h: h, before=put)
    assert kinds_of() == "the layers hold tensors that are in no checkpoint"


CALL = "hidden_states = decoder_layer(\n            hidden_states,"
LOOP = "for decoder_layer in self.layers[: self.config.num_hidden_layers]:"


@pytest.mark.parametrize(("pieces", "kinds"), [
    ([(LOOP, "for number, decoder_layer in enumerate(self.layers):\n        if number == 4: "
             "hidden_states = hidden_states * 2")], "what is done between the layers depends on their number"),
    ([(LOOP, "for number, decoder_layer in enumerate(self.layers):"),
      (CALL, CALL.replace("hidden_states,", "hidden_states * (2.0 if number == 5 else 1.0),"))],
     "what is done between the layers depends on their number"),
    ([(LOOP, "for number, decoder_layer in enumerate(self.layers):"),
      ("position_embeddings=position_embeddings,",
       "position_embeddings=position_embeddings if number < 4 else position_embeddings[::-1],")], COUNTED),
    ([("hidden_states = self.norm(hidden_states)",
       "hidden_states = self.norm(hidden_states) / len(self.layers)")], COUNTED),
    ([("hidden_states = inputs_embeds\n", "hidden_states = inputs_embeds * len(self.layers)\n")], COUNTED),
    ([(LOOP, "for number, decoder_layer in enumerate(self.layers):")], ALIKE),
], ids=["between", "argument", "passed", "after", "before", "harmless"])
def test_code_around_the_layers_that_counts_them_is_traced_whole(loop_code, pieces, kinds):
    loop_code(*pieces)
    assert kinds_of() == kinds


@pytest.mark.whole_model
@pytest.mark.parametrize(("after", "traced"), [
    (lambda _, i, h: h * 2 if i >= 3 else h, 4), (lambda _, i, h: h * torch.full((64,), TABLE[i], device=h.device), 4),
    (lambda _, i, h: h * (i + 1), 6)], ids=["branch", "constant", "factor"])
def test_a_model_whose_layers_depend_on_their_depth_is_the_fully_traced_one(layer_code, after, traced):
    layer_code(after)
    options = {"dtype": "float32", "cache": "growing", "capacity": 64}
    stamped, whole = trace(config_of(), **options), trace(config_of(), stamping=False, **options)
    assert (stamped.traced_layers, whole.traced_layers) == (traced, LAYERS)
    assert output_hashes(stamped.model) == output_hashes(whole.model)


@pytest.fixture
def folder(tmp_path):
    return gqa_models.write_tiny("llama", tmp_path / "llama", num_hidden_layers=4)


@pytest.fixture
def traces(tmp_path, monkeypatch):
    (tmp_path / "traces").mkdir()
    monkeypatch.setenv(trace_cache.FOLDER, str(tmp_path / "traces"))
    return tmp_path / "traces"


@pytest.mark.whole_model
@pytest.mark.parametrize("how", ["class", "method"])
def test_code_that_was_changed_in_memory_neither_takes_nor_leaves_a_kept_trace(folder, traces, tmp_path, monkeypatch,
                                                                              layer_code, how):
    stock = export_onnx(folder, tmp_path / "stock")
    assert len(list(traces.iterdir())) == 1
    if how == "class":
        layer_code(lambda _, i, h: h * 2 if i >= 2 else h)
    else:
        forward = modeling_llama.LlamaMLP.forward
        monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: forward(self, x) * 2)
    changed = export_onnx(folder, tmp_path / "changed")
    assert not changed.trace_kept
    assert (changed.folder / "model.onnx").read_bytes() != (stock.folder / "model.onnx").read_bytes()
    assert len(list(traces.iterdir())) == 1


@pytest.mark.whole_model
def test_a_stamped_model_that_fails_validation_is_traced_whole_once_and_that_is_said(folder, traces, tmp_path,
                                                                                     layer_code, monkeypatch):
    """As if the probe had not seen the layers' code: only the comparison can tell then."""
    layer_code(lambda _, i, h: h * 2 if i >= 2 else h)
    layers = layer_kinds.stack_of
    monkeypatch.setattr(layer_kinds, "stack_of", lambda model, probed: layers(model, SimpleNamespace(
        spec=probed.spec, code=SimpleNamespace(path=probed.code.path, in_order=True, between=(), around="",
                                               layers=dict.fromkeys(range(4), "alike")))))
    monkeypatch.setattr(layer_kinds, "check_shortened", lambda *_: None)
    monkeypatch.setattr(trace_cache, "changed_in_memory", lambda *_: False)
    result = CliRunner().invoke(main, ["onnx", str(folder), "-o", str(tmp_path / "bundle")])
    assert result.exit_code == 0, result.output
    assert result.output.count("2 of 4 layers were traced, the others are copies: the model is traced again") == 1
    assert "PASSED" in result.output
    again = export_onnx(folder, tmp_path / "again")
    assert (again.trace_kept, again.traced_layers) == (True, 4)  # the whole trace took the other's place
    assert (again.folder / "model.onnx").read_bytes() == (tmp_path / "bundle" / "model.onnx").read_bytes()


@pytest.mark.whole_model
def test_stamping_can_be_left_out(folder, traces, tmp_path):
    first = export_onnx(folder, tmp_path / "a")
    whole = export_onnx(folder, tmp_path / "b", ExportOptions(stamping=False))
    assert (first.stamped, whole.stamped, whole.trace_kept) == (True, False, False)
