"""What every decoder layer's code does, as a digest: two layers with one digest do the same to different weights.

While the model runs once without weights, each operation is written down in the layer that it runs in: its name, the
shapes and types of its results, its scalar arguments, and where each tensor argument comes from. A tensor is named
by its place in the layer (an earlier result, a weight, an argument of the layer), never by its number among all, so
that layers which differ in nothing but their place get the same text. A layer's number that only finds its cache is
in no operation; one that reaches arithmetic is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ...checkpoint.decoder_layers import layer_lists

HEAD, TAIL = "head", "tail"
FROM_PYTHON = frozenset({"tensor", "as_tensor", "asarray", "new_tensor"})
"""functions that make a tensor of Python's numbers: on a device without memory their values would be lost"""
INDEXING = frozenset({"__getitem__", "__setitem__"})
"""functions that make tensors of lists among their arguments, likewise"""


@dataclass(frozen=True)
class LayerCode:
    """What the layers of a stack do.

    Attributes:
        path: dotted name of their ModuleList.
        layers: digest of each layer by its number.
        between: digest of what is done between one layer and the next, for each pair.
        around: digest of all that is done before the first layer and after the last.
        in_order: every layer was called once, in the order of the list.
    """

    path: str
    layers: Mapping[int, str]
    between: tuple[str, ...]
    around: str
    in_order: bool


def layers_path(model: torch.nn.Module, count: int | None = None) -> str | None:
    """The ModuleList whose item i makes attention call i, for all i; None if there is not one.

    count: of its items; None finds the longest.
    """
    for name, layers in sorted(layer_lists(model, count), key=lambda pair: -len(pair[1])):
        indices = [{sub.layer_idx for sub in layer.modules() if isinstance(getattr(sub, "layer_idx", None), int)}
                   for layer in layers]
        if indices == [{i} for i in range(len(layers))]:
            return name
    return None


class _Segment:
    """What was done in one layer, or between two. sources: where each argument of the layer that was used came from."""

    def __init__(self, name: str, layer: int = -1) -> None:
        self.name, self.layer = name, layer
        self.lines: list[str] = []
        self.arguments: dict[int, str] = {}
        self.sources: dict[str, str] = {}
        self.used: set[str] = set()
        self.outputs: dict[int, str] = {}

    def digest(self, sources: Mapping[str, str]) -> str:
        text = "\n".join([*self.lines, *(f"{path} = {sources[path]}" for path in sorted(self.used))])
        return hashlib.sha256(text.encode()).hexdigest()


class CodeRecorder:
    """Records the operations of the layers at `path` while a model runs; `code` is what they came to."""

    def __init__(self, model: torch.nn.Module, path: str) -> None:
        self.path = path
        self._layers = {int(name): layer for name, layer in model.get_submodule(path).named_children()}
        self._weights = {id(tensor): name for name, tensor in (*model.named_parameters(remove_duplicate=False),
                                                              *model.named_buffers(remove_duplicate=False))}
        self._tokens: dict[int, tuple[str, int, int]] = {}
        self._made: dict[int, str] = {}
        self._strangers: dict[int, int] = {}
        self._kept: list[Any] = []  # an id is that of its tensor only while this lives
        self._indexing = 0
        self._segments = [_Segment(HEAD)]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what is run in the block; what an earlier block recorded is forgotten."""
        self._tokens, self._made, self._strangers, self._kept = {}, {}, {}, []
        self._segments = [_Segment(HEAD)]
        with ExitStack() as stack:
            for number, layer in self._layers.items():
                for handle in (layer.register_forward_pre_hook(self._enter(number), with_kwargs=True),
                               layer.register_forward_hook(self._leave(number))):
                    stack.callback(handle.remove)
            stack.enter_context(_Functions(self))
            stack.enter_context(_Operations(self))
            yield

    def note(self, name: str, *tensors: torch.Tensor | None) -> None:
        """Write down a step that is no operation of PyTorch."""
        self._line(f"{name}({', '.join(map(self._described, tensors))})")

    @property
    def code(self) -> LayerCode:
        """What was recorded."""
        layers = [segment for segment in self._segments if segment.layer >= 0]
        between = [segment for segment in self._segments if segment.name.startswith("before")]
        second = layers[1].sources if len(layers) > 1 else {}
        digests = {}
        for place, segment in enumerate(layers):
            sources = dict(segment.sources)
            if place == 0:  # what later layers get from the one before them, the first gets from elsewhere
                sources |= {path: source for path, source in second.items()
                            if path in sources and source.startswith(("carried", "between"))}
            digests[segment.layer] = segment.digest(sources)
        around = [segment.digest({}) for segment in self._segments if segment.name in (HEAD, TAIL)]
        return LayerCode(self.path, digests, tuple(part.digest({}) for part in between),
                         hashlib.sha256("\n".join(around).encode()).hexdigest(),
                         [segment.layer for segment in layers] == list(self._layers))

    @property
    def _here(self) -> _Segment:
        return self._segments[-1]

    def _enter(self, number: int) -> Callable[..., None]:
        def enter(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            segment = _Segment(f"layer {number}", number)
            for path, tensor in _tensors((args, kwargs)):
                self._kept.append(tensor)
                segment.sources[path] = self._source(tensor)
                segment.arguments.setdefault(id(tensor), path)
            self._segments.append(segment)
        return enter

    def _leave(self, number: int) -> Callable[..., None]:
        last = number == list(self._layers)[-1]

        def leave(_: torch.nn.Module, __: tuple[Any, ...], output: Any) -> None:
            segment = self._here
            for path, tensor in _tensors(output):
                self._kept.append(tensor)
                segment.lines.append(f"return {path} {self._described(tensor)}")
                segment.outputs.setdefault(id(tensor), path)
            self._segments.append(_Segment(TAIL if last else f"before the layer after {number}"))
        return leave

    def _before(self) -> _Segment | None:
        """The layer that ran last."""
        return next((segment for segment in reversed(self._segments) if segment.layer >= 0), None)

    def _source(self, tensor: torch.Tensor) -> str:
        """Where a tensor that enters a layer comes from, in words that are the same for every layer."""
        before, token = self._before(), self._tokens.get(id(tensor))
        if before is not None and id(tensor) in before.outputs:
            return f"carried {before.outputs[id(tensor)]}"
        if token is not None and token[0] == self._here.name and token[0] not in (HEAD, TAIL):
            return f"between {token[1]}.{token[2]}"
        return self._named(tensor)

    def _named(self, tensor: torch.Tensor) -> str:
        """A tensor from outside of this segment."""
        token = self._tokens.get(id(tensor))
        if token is not None:
            return f"{token[0]}: {token[1]}.{token[2]}"
        if id(tensor) in self._weights:
            name, own = self._weights[id(tensor)], f"{self.path}.{self._here.layer}."
            return f"weight {name.removeprefix(own)}" if name.startswith(own) else f"weight of the model {name}"
        if id(tensor) in self._made:
            return self._made[id(tensor)]
        self._kept.append(tensor)
        if tensor.device.type != "meta":
            return f"constant {_values(tensor)}"
        if self._indexing:
            return "index"  # the list that it was made of is written down
        return f"stranger {self._strangers.setdefault(id(tensor), len(self._strangers))}"

    def _described(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            segment, token = self._here, self._tokens.get(id(value))
            if token is not None and token[0] == segment.name:
                return f"%{token[1]}.{token[2]}"
            if id(value) in segment.arguments:
                path = segment.arguments[id(value)]
                segment.used.add(path)
                return f"argument {path}"
            before = self._before() if segment.layer < 0 else None
            name = f"carried {before.outputs[id(value)]}" if before is not None and id(value) in before.outputs else \
                self._named(value)
            return f"{name} {tuple(value.shape)} {value.dtype}"
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self._described, value))}]"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{key}: {self._described(one)}' for key, one in value.items())}}}"
        return repr(value)

    def _line(self, text: str, result: Any = None) -> None:
        place = len(self._here.lines)
        shown = []
        for number, tensor in enumerate(result if isinstance(result, list | tuple) else [result]):
            if isinstance(tensor, torch.Tensor):
                self._kept.append(tensor)
                self._tokens[id(tensor)] = (self._here.name, place, number)
                shown.append(f"{tuple(tensor.shape)} {tensor.dtype}")
            elif tensor is not None:
                shown.append(repr(tensor))
        self._here.lines.append(f"{text} -> {', '.join(shown)}")

    def operation(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
        """Run an operation and write it down."""
        text = f"{name}({self._described(args)}, {self._described(kwargs)})"
        result = run()
        self._line(text, result)
        return result

    def function(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
        """Run a function that makes tensors of Python's numbers, and write those numbers down."""
        if name in FROM_PYTHON:
            result = run()
            given = (*args[name == "new_tensor":], *kwargs.values())
            if not any(isinstance(value, torch.Tensor) for value in given) and id(result) not in self._tokens:
                self._kept.append(result)
                self._made[id(result)] = f"made of {plain(given)}"
            return result
        self._here.lines.append(f"{name} {plain([value for value in args if not isinstance(value, torch.Tensor)])}")
        self._indexing += 1
        try:
            return run()
        finally:
            self._indexing -= 1


class _Operations(TorchDispatchMode):
    def __init__(self, recorder: CodeRecorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self.recorder.operation(str(func), args, kwargs, lambda: func(*args, **kwargs))


class _Functions(TorchFunctionMode):
    def __init__(self, recorder: CodeRecorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in FROM_PYTHON or name in INDEXING:
            return self.recorder.function(name, args, kwargs, lambda: func(*args, **kwargs))
        return func(*args, **kwargs)


def plain(value: Any) -> str:
    """A value of Python or numpy as text: an array by its type, shape and numbers, a tensor by its shape."""
    if isinstance(value, torch.Tensor):
        return f"tensor {tuple(value.shape)} {value.dtype}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(plain, value))}]"
    if hasattr(value, "tobytes") and hasattr(value, "dtype"):  # numpy's, which prints long arrays shortened
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return repr(value)


def _values(tensor: torch.Tensor) -> str:
    """The content of a tensor that has one."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested arguments, each with its place."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _tensors(one, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for place, one in enumerate(value):
            yield from _tensors(one, f"{path}.{place}")
