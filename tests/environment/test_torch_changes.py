"""What PyTorch does at its import, done once or later: the same results."""

from __future__ import annotations

import inspect
import sys
import types

import pytest
import torch

from gqa_export.environment import torch_changes


def here() -> types.FrameType:
    return sys._getframe()


def test_a_caller_is_named_by_the_same_file_and_line():
    upstream = types.ModuleType("utils")
    torch_changes.name_callers_alone(upstream)
    ours, theirs = upstream.get_source(1), torch._library.utils.get_source(1)
    assert ours == theirs
    assert ours.startswith(__file__)


def test_a_frame_has_the_module_that_inspect_finds():
    library = types.ModuleType("library")
    torch_changes.ask_frames_first(library)
    assert library.inspect.getmodule(here()) is inspect.getmodule(here()) is sys.modules[__name__]
    namespace = {"__name__": __name__, "sys": sys}  # only says that it is this module
    frame = eval("sys._getframe()", namespace)
    assert library.inspect.getmodule(frame) is inspect.getmodule(frame)
    assert library.inspect.getmodule(here) is sys.modules[__name__]
    assert library.inspect.signature is inspect.signature


@pytest.fixture
def counted(monkeypatch):
    """How often upstream makes an autograd function from now on."""
    from torch._library import autograd

    made, make = [], autograd.make_autograd_impl
    monkeypatch.setattr(autograd, "make_autograd_impl", lambda op, info: (made.append(op), make(op, info))[1])
    torch_changes.make_gradients_later(autograd)
    yield made
    autograd.make_autograd_impl = make


def test_an_operator_has_its_gradient_which_is_made_when_it_is_called(counted):
    @torch.library.custom_op("gqa_test::cube", mutates_args=())
    def cube(x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return scale * x ** 3

    def keep(ctx, inputs, keyword_only_inputs, output):
        ctx.save_for_backward(*inputs)

    cube.register_autograd(lambda ctx, grad: grad * 3 * ctx.saved_tensors[0] ** 2, setup_context=keep)
    assert counted == []
    for _ in range(2):
        x = torch.tensor([2.0, -1.0], requires_grad=True)
        cube(x).sum().backward()
        assert x.grad.tolist() == [12.0, 3.0]
    assert cube(torch.tensor([2.0]), scale=2.0).tolist() == [16.0]
    assert len(counted) == 1


def test_operators_are_looked_up_again_only_if_there_are_new_ones():
    calls = []
    upstream = types.SimpleNamespace(_materialize_cpp_cia_ops=lambda: calls.append(None))
    torch_changes.materialize_once(upstream)
    for _ in range(3):
        upstream._materialize_cpp_cia_ops()
    assert len(calls) == 1
    library = torch.library.Library("gqa_test_cia", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CompositeImplicitAutograd")
    upstream._materialize_cpp_cia_ops()
    assert len(calls) == 2
    library._destroy()
