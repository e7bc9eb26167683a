"""torch.onnx's library of translations, whose functions are parsed when a graph needs them and not before.

Importing it parses the source of 47 functions, infers the signatures of 435 more, and filling a registry does it again
for all: most of the time that either takes. A graph is translated with some forty.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import onnxscript
from onnxscript._internal import values
from onnxscript.ir import _schemas

from ...environment.stand_ins import TORCHLIB

PARSED = ("function_ir", "source", "kwargs", "traceable", "_signature")
"""what an OnnxFunction has from its source"""


class Unparsed(values.OnnxFunction[Any, Any]):
    """An ONNX function that is parsed, and becomes an ordinary one, when something that takes its source is asked."""

    def __init__(self, opset: Any, function: Callable[..., Any], parse: Callable[[Any], Any]) -> None:
        values.Op.__init__(self, opset, function.__name__)
        self.function = function
        self.__dict__.pop("_signature", None)
        self.__dict__["_gqa_parse"] = parse
        functools.update_wrapper(self, function)

    def __getattr__(self, name: str) -> Any:
        if name not in PARSED or "_gqa_parse" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        parsed = self.__dict__.pop("_gqa_parse")(self.function)
        self.__class__ = values.OnnxFunction  # type: ignore[assignment]
        self.__dict__.update({**vars(parsed), **self.__dict__})
        return getattr(self, name)


class Unsigned(values.TracedOnnxFunction):
    """A traced ONNX function whose signature is inferred when it is asked for."""

    def __init__(self, opset: Any, function: Callable[..., Any]) -> None:
        values.Op.__init__(self, opset, function.__name__)
        self.func = function
        functools.update_wrapper(self, function)

    @property
    def op_signature(self) -> Any:
        """As that of any other."""
        self.op_signature = _schemas.op_signature_from_function(self.func, domain="_traced", name=self.name)
        return self._signature

    @op_signature.setter
    def op_signature(self, value: Any) -> None:
        """As of any other, from then on."""
        self.__class__ = values.TracedOnnxFunction  # type: ignore[assignment]
        self._signature = value


@contextlib.contextmanager
def unparsed() -> Iterator[None]:
    """Inside, no function of the library is parsed and no ONNX signature is inferred; `translate` infers those that a
    graph needs."""
    from torch.onnx._internal.exporter import _registration

    with contextlib.ExitStack() as stack:
        def put(owner: Any, name: str, value: Any) -> None:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        domain = property(lambda self: SimpleNamespace(domain=self.opset.domain))
        kind: Any = values.TracedOnnxFunction
        if isinstance(vars(kind).get("function_ir"), property):  # another onnxscript goes its own way
            put(kind, "function_ir", domain)
        entry: Any = _registration.OnnxDecompMeta
        if "__post_init__" in vars(entry):
            put(entry, "__post_init__", lambda self: None)
        if TORCHLIB.applies():
            script = onnxscript.script
            lazy: Any = Unparsed

            def later(opset: Any = None, *others: Any, **named: Any) -> Any:
                parse = script(opset, *others, **named)
                plain = isinstance(opset, values.Opset) and not others and not named
                return functools.partial(Unparsed, opset, parse=parse) if plain else parse

            put(onnxscript, "script", later)
            put(kind, "__init__", _unsigned)
            lazy.function_ir = domain
            stack.callback(delattr, lazy, "function_ir")
        yield


def _unsigned(self: Any, opset: Any, function: Callable[..., Any]) -> None:
    self.__class__ = Unsigned
    Unsigned.__init__(self, opset, function)
