"""What a layer's modules hold beside weights, as text: numbers, lists, tables, functions by their code.

Two layers whose modules hold different things may compute differently at lengths that the probe does not run at.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterator
from typing import Any

import torch

PLACE = frozenset({"layer_idx", "layer_id", "layer_number"})
"""a layer's number in the model: it finds the cache; where it reaches arithmetic, the layer's code shows it"""
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, slice)
OF_PYTORCH = frozenset(vars(torch.nn.Module())) | {"_is_hf_initialized"}
DEPTH = 6


def attributes(module: torch.nn.Module) -> tuple[tuple[str, str], ...]:
    """Name and text of everything that a module's own code put into it, sorted."""
    return tuple((name, described(value)) for name, value in sorted(vars(module).items())
                 if name not in PLACE and name not in OF_PYTORCH)


def scalars(module: torch.nn.Module) -> tuple[tuple[str, str], ...]:
    """Name and text of a module's public numbers, strings and switches, sorted."""
    return tuple(sorted((name, repr(value)) for name, value in vars(module).items()
                        if isinstance(value, bool | int | float | str | None | torch.dtype) and name not in PLACE
                        and not name.startswith("_")))


def tensors(module: torch.nn.Module) -> Iterator[str]:
    """Names of the tensors that a module holds neither as weights nor as buffers, in lists and tables too."""
    for name, value in vars(module).items():
        if name not in OF_PYTORCH and _holds_tensor(value, DEPTH):
            yield name


def _holds_tensor(value: Any, depth: int) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if depth and isinstance(value, list | tuple | set | frozenset):
        return any(_holds_tensor(one, depth - 1) for one in value)
    return bool(depth) and isinstance(value, dict) and any(_holds_tensor(one, depth - 1) for one in value.values())


def described(value: Any, depth: int = DEPTH) -> str:
    """A value as text: equal for equal values, and for functions of the same code over equal values."""
    if isinstance(value, PLAIN):
        return repr(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if not depth or isinstance(value, torch.Tensor | torch.nn.Module):
        return kind
    inner = functools.partial(described, depth=depth - 1)
    if isinstance(value, list | tuple):
        return f"{kind}[{', '.join(map(inner, value))}]"
    if isinstance(value, set | frozenset):
        return f"{kind}{{{', '.join(sorted(map(inner, value)))}}}"
    if isinstance(value, dict):
        return f"{kind}{{{', '.join(f'{inner(key)}: {inner(one)}' for key, one in value.items() if key not in PLACE)}}}"
    if isinstance(value, functools.partial):
        return f"partial({inner(value.func)}, {inner(value.args)}, {inner(value.keywords)})"
    if isinstance(value, types.MethodType):
        return f"method({inner(value.__func__)}, {inner(value.__self__)})"
    if isinstance(value, types.FunctionType):
        cells = tuple(_content(cell) for cell in value.__closure__ or ())
        return (f"function({value.__module__}.{value.__qualname__}, {_code(value.__code__)}, {inner(cells)}, "
                f"{inner(value.__defaults__)}, {inner(value.__kwdefaults__)})")
    if isinstance(value, type | types.BuiltinFunctionType | types.ModuleType):
        return f"{kind} {getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
    if hasattr(value, "tobytes") and hasattr(value, "dtype"):  # an array or a number of numpy
        return f"{kind} {value.dtype} {getattr(value, 'shape', ())} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if hasattr(value, "to_dict") and hasattr(value, "model_type"):
        return kind  # the model's configuration, which knows the number of layers; what is used of it is in the code
    own = getattr(value, "__dict__", None)
    return f"{kind}({inner(own)})" if own else kind


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _code(code: types.CodeType) -> str:
    """A digest of compiled code, of the functions inside it too."""
    constants = [_code(one) if isinstance(one, types.CodeType) else repr(one) for one in code.co_consts]
    text = "\n".join([code.co_code.hex(), repr(code.co_names), repr(code.co_varnames), *constants])
    return hashlib.sha256(text.encode()).hexdigest()
