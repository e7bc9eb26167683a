"""What the fields of a manifest must be to one another; their types and bounds stand with the fields themselves
(`manifest.py`). A manifest comes from outside: nothing relies on it before these rules hold. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath, PureWindowsPath

from ..errors import InvalidBundle
from ..graph_io import HIDDEN_STATES, TensorFact, past_names, past_state, present_names, present_state
from ..spec import DTYPES, AttentionSpec, KvCache, ModelSpec, WindowCache
from .quantization import Quantization

Tensors = tuple[TensorFact, ...]
FIX = "export the bundle again with this version of gqa-export"


def inside(name: str) -> bool:
    """Whether a name is that of a file in the folder: relative, without a way out, on any system."""
    if not name or len(name) > 1024 or "\x00" in name or "\\" in name:
        return False
    parts = PurePosixPath(name).parts
    windows = PureWindowsPath(name)
    return not (PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in parts or not parts
                or any(len(part.encode()) > 255 for part in parts))


def check_names(files: Iterable[str], engine_file: str, where: str) -> None:
    """Check that the files of a manifest lie in the bundle. engine_file: of its engine, "" without one.

    Raises:
        InvalidBundle: a name leads out of the folder.
    """
    outside = [name for name in files if not inside(name)]
    if engine_file and ("/" in engine_file or not inside(engine_file)):
        outside.append(engine_file)
    if outside:
        raise InvalidBundle(f"the manifest names a file outside the bundle: {outside[0][:80]!r}", where,
                            "do not use this bundle", code="E-BUNDLE-OUTSIDE")


def check_tensors(spec: ModelSpec, dtype: str, inputs: Tensors, outputs: Tensors, where: str,
                  kv: KvCache | None = None, windows: WindowCache | None = None) -> None:
    """Hold the layers of a manifest and the tensors of its graph against one another. kv: how the cache is quantized.
    windows: layers whose cache is a ring.

    Raises:
        InvalidBundle: heads do not divide, a name occurs twice, or the cache tensors are not those of the layers.
    """
    for message in (_layers(spec), _twice("inputs", inputs), _twice("outputs", outputs),
                    _scales(spec, kv), _cache(spec, dtype, "inputs", inputs, kv, windows),
                    _cache(spec, dtype, "outputs", outputs, kv, windows), _hidden(spec, dtype, outputs)):
        if message:
            raise InvalidBundle(f"not a valid bundle manifest: {message}", where, FIX, code="E-BUNDLE-MANIFEST")


def check_windows(windows: WindowCache | None, spec: ModelSpec, cache: str, capacity: int, where: str) -> None:
    """Check that rings are those of layers with a window, and that they keep less than the capacity.

    Raises:
        InvalidBundle: a ring's layer is unknown, has no window, or its ring is no smaller than the whole cache.
    """
    if windows is None:
        return
    layers = {layer.layer: layer for layer in spec.layers}
    wrong = "" if cache == "static" else f"a {cache} cache has no rings"
    if list(windows.layers) != sorted(set(windows.layers)):
        wrong = "its layers are not in order, each once"
    for number in windows.layers:
        if number not in layers or layers[number].window < 1:
            wrong = f"layer {number} has no window"
        elif layers[number].owner is not None:
            wrong = f"layer {number} has no cache"
        elif any(each.window != layers[number].window for each in spec.layers if each.owner == number):
            wrong = f"the ring of layer {number} is read by a layer with another window"
        elif windows.slots(layers[number]) >= capacity:
            wrong = f"layer {number} would keep {windows.slots(layers[number])} slots of a capacity of {capacity}"
    if wrong:
        raise InvalidBundle(f"not a valid bundle manifest: window_cache: {wrong}", where, FIX, code="E-BUNDLE-MANIFEST")


def check_weights(quantization: Quantization | None, where: str) -> None:
    """Check that what is said of each quantized weight can be so.

    Raises:
        InvalidBundle: the bits are not those of the kind of code, a block is missing, or the like.
    """
    if quantization is None:
        return
    for position, weight in enumerate(quantization.weights):
        wrong = weight.problem(quantization.method, quantization.activations)
        if wrong:
            raise InvalidBundle(f"not a valid bundle manifest: quantization.weights[{position}]: {wrong}", where, FIX,
                                code="E-BUNDLE-MANIFEST")


def _kept(layer: AttentionSpec) -> tuple[int, int, int]:
    return layer.kv_num_heads, layer.head_size, layer.value_head_size


def _layers(spec: ModelSpec) -> str:
    owners = {layer.layer: layer for layer in spec.owners}
    for position, layer in enumerate(spec.layers):
        if layer.num_heads % layer.kv_num_heads:
            return (f"spec.layers[{position}]: {layer.kv_num_heads} key/value heads do not divide {layer.num_heads} "
                    "query heads")
        if layer.owner is not None and (layer.owner not in owners or layer.owner >= layer.layer or _kept(
                owners[layer.owner]) != _kept(layer)):
            return (f"spec.layers[{position}]: it reads the cache of layer {layer.owner}, which is not a layer before "
                    "it with the same heads and sizes and a cache")
        if layer.window and layer.chunk:
            return (f"spec.layers[{position}]: a window of {layer.window} and chunks of {layer.chunk}, expected one of "
                    "them or none")
    reads = [layer.owner is not None for layer in spec.layers]
    if reads != sorted(reads):
        return "spec.layers: a layer with a cache comes after one that reads another's, expected all before it"
    if len({layer.layer for layer in spec.layers}) != len(spec.layers):
        return "spec.layers names a layer twice"
    if len({(state.layer, state.name) for state in spec.states}) != len(spec.states):
        return "spec.states names a state twice"
    for position, state in enumerate(spec.states):
        if len(state.shape) != len(state.axes):
            return (f"spec.states[{position}]: a {state.kind} state has {len(state.axes)} axes ({', '.join(state.axes)}"
                    f"), found the shape {list(state.shape)}")
    return ""


def _twice(field: str, tensors: Tensors) -> str:
    return f"{field} names a tensor twice" if len({tensor.name for tensor in tensors}) != len(tensors) else ""


def _scales(spec: ModelSpec, kv: KvCache | None) -> str:
    if kv is not None and [scales.layer for scales in kv.scales] != [layer.layer for layer in spec.owners]:
        return "kv_cache.scales are not those of spec.layers"
    return ""


def _hidden(spec: ModelSpec, dtype: str, outputs: Tensors) -> str:
    fact = next((tensor for tensor in outputs if tensor.name == HIDDEN_STATES), None)
    dtype = DTYPES.get(dtype, dtype)
    if fact is not None and (len(fact.shape) != 3 or fact.shape[2] != spec.hidden_size
                             or DTYPES.get(fact.dtype, fact.dtype) != dtype):
        return (f"{HIDDEN_STATES} is {fact.dtype} {list(fact.shape)}, expected {dtype} [batch, sequence, "
                f"{spec.hidden_size}]")
    return ""


def _cache(spec: ModelSpec, dtype: str, field: str, tensors: Tensors, kv: KvCache | None,
           windows: WindowCache | None) -> str:
    """What is wrong with the cache tensors among `tensors`, held against the layers; "" where nothing is."""
    if not tensors:
        return ""
    names_of = past_names if field == "inputs" else present_names
    dtype = DTYPES.get(dtype, dtype) if kv is None else kv.dtype
    facts = {tensor.name: tensor for tensor in tensors}
    for layer in spec.owners:
        for name, size in zip(names_of(layer.layer), (layer.head_size, layer.value_head_size)):
            fact = facts.get(name)
            size = size if kv is None else kv.width(size)
            if fact is None:
                return f"{field} lack {name}"
            found = DTYPES.get(fact.dtype, fact.dtype)
            if len(fact.shape) != 4 or (fact.shape[1], fact.shape[3]) != (layer.kv_num_heads, size) or found != dtype:
                return (f"{name} of {field} is {found} {list(fact.shape)}, its layer needs {dtype}, heads and size "
                        f"{[layer.kv_num_heads, size]}")
            slots = windows.slots(layer) if windows else 0
            if slots and fact.shape[2] != slots:
                return f"{name} of {field} is {list(fact.shape)}, window_cache gives its layer {slots} slots"
    name_of = past_state if field == "inputs" else present_state
    for state in spec.states:
        fact = facts.get(name_of(state))
        if fact is None:
            return f"{field} lack {name_of(state)}"
        if fact.shape[1:] != state.shape or DTYPES.get(fact.dtype, fact.dtype) != state.dtype:
            return (f"{fact.name} of {field} is {fact.dtype} {list(fact.shape)}, its state needs {state.dtype} and the "
                    f"shape {list(state.shape)} after the batch")
    return ""
